/* Runs a compacted network on planar float maps. See _native.py for how a program gets here.
 *
 * Contract: no Python, no torch, no allocation, no globals: everything is passed in, so any number of threads may run at once.
 * What is passed in has been checked by the caller. Plain C with the vector types of GCC and Clang; on x86-64 with glibc each kernel
 * is compiled for AVX-512, AVX2 and the baseline, and the loader of the system picks one.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(DNW_SANITIZE)
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST
#endif

#define LANES 16
#define TILE 4 /* vectors of one register tile: 64 places */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));

enum { EDGES, AFFINE, INSTANCE_NORM, RECTIFY, DEPTHWISE, CONVOLUTION, NODE, MEAN, LINEAR, RESTORE, PICK };

/* One instruction. Offsets are places in the arena of one image, in floats. There, each row of a map is followed by one float that
 * means nothing, so that the neighbours of a place are at the same distance everywhere, and a map takes a multiple of LANES floats. */
typedef struct {
  int32_t kind, sources, targets, height, width, out_height, out_width;
  int32_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, start, stop, maps;
  int64_t from, to, scratch;
  float eps;
  const float *weight, *scale, *shift, *core;
  const int32_t *starts, *indices, *channels, *rows, *columns;
} instruction;

int dnw_version(void) { return 3; }

int64_t dnw_size(void) { return (int64_t)sizeof(instruction); }

/* From one row of a map to the next. A single number has no rows. */
static int32_t pitch(int32_t height, int32_t width) { return height == 1 && width == 1 ? 1 : width + 1; }

/* Floats that a map takes. */
static int64_t plane(int32_t height, int32_t width) {
  int64_t floats = (int64_t)height * pitch(height, width);
  return floats == 1 ? 1 : (floats + LANES - 1) / LANES * LANES;
}

/* What constant nodes add to target t: its base is in the sum already. */
static void add_map(const instruction *op, int32_t map, float *out) {
  int32_t across = op->columns[op->out_width - 1] + 1;
  const float *core = op->core + (int64_t)map * (op->rows[op->out_height - 1] + 1) * across;
  for (int32_t y = 0; y < op->out_height; y++)
    for (int32_t x = 0; x < op->out_width; x++)
      out[y * pitch(op->out_height, op->out_width) + x] += core[op->rows[y] * across + op->columns[x]];
}

static void add_constants(const instruction *op, float *out) {
  int64_t places = plane(op->out_height, op->out_width);
  for (int32_t m = 0; m < op->maps; m++) add_map(op, m, out + op->channels[m] * places);
}

/* out[t] = base[t] + sum of weight * in[source] over the edges of t, a tile of places in registers at a time. */
FAST static void edges(const instruction *op, const float *in, float *out) {
  int64_t places = plane(op->height, op->width), place = 0;
  for (; place + TILE * LANES <= places; place += TILE * LANES)
    for (int32_t t = 0; t < op->targets; t++) {
      vec sum0 = (op->shift ? op->shift[t] : 0.0f) + (vec){0}, sum1 = sum0, sum2 = sum0, sum3 = sum0;
      for (int32_t e = op->starts[t]; e < op->starts[t + 1]; e++) {
        const vec *source = (const vec *)(in + op->indices[e] * places + place);
        float weight = op->weight[e];
        sum0 += weight * source[0], sum1 += weight * source[1], sum2 += weight * source[2], sum3 += weight * source[3];
      }
      vec *target = (vec *)(out + t * places + place);
      target[0] = sum0, target[1] = sum1, target[2] = sum2, target[3] = sum3;
    }
  for (; place + LANES <= places; place += LANES)
    for (int32_t t = 0; t < op->targets; t++) {
      vec sum = (op->shift ? op->shift[t] : 0.0f) + (vec){0};
      for (int32_t e = op->starts[t]; e < op->starts[t + 1]; e++)
        sum += op->weight[e] * *(const vec *)(in + op->indices[e] * places + place);
      *(vec *)(out + t * places + place) = sum;
    }
  for (; place < places; place++) /* maps of a single place */
    for (int32_t t = 0; t < op->targets; t++) {
      float sum = op->shift ? op->shift[t] : 0.0f;
      for (int32_t e = op->starts[t]; e < op->starts[t + 1]; e++) sum += op->weight[e] * in[op->indices[e] * places + place];
      out[t * places + place] = sum;
    }
}

FAST static void affine(const instruction *op, const float *in, float *out) {
  int64_t places = plane(op->height, op->width);
  for (int32_t c = 0; c < op->sources; c++)
    for (int64_t i = 0; i < places; i++) out[c * places + i] = in[c * places + i] * op->scale[c] + op->shift[c];
}

FAST static void instance_norm(const instruction *op, const float *in, float *out) {
  int64_t places = (int64_t)op->height * op->width, stride = plane(op->height, op->width);
  int32_t step = pitch(op->height, op->width);
  for (int32_t c = 0; c < op->sources; c++) {
    const float *map = in + c * stride;
    double sum = 0, squares = 0;
    for (int32_t y = 0; y < op->height; y++)
      for (int32_t x = 0; x < op->width; x++) sum += map[y * step + x];
    double mean = sum / (double)places;
    for (int32_t y = 0; y < op->height; y++)
      for (int32_t x = 0; x < op->width; x++) squares += (map[y * step + x] - mean) * (map[y * step + x] - mean);
    float scale = (float)(op->scale[c] / sqrt(squares / (double)places + op->eps));
    float shift = (float)(op->shift[c] - mean * scale);
    for (int64_t i = 0; i < stride; i++) out[c * stride + i] = map[i] * scale + shift;
  }
}

FAST static void rectify(const instruction *op, const float *in, float *out) {
  int64_t count = op->sources * plane(op->height, op->width);
  for (int64_t i = 0; i < count; i++) out[i] = in[i] > 0.0f ? in[i] : 0.0f;
}

/* Row by row: the places that a row of targets reads, side by side in scratch [reads][width], and then sums of them. */
FAST static void convolution(const instruction *op, const float *in, float *out, float *scratch, int32_t depthwise) {
  int64_t places = plane(op->height, op->width), out_places = plane(op->out_height, op->out_width);
  int32_t kernel = op->kernel_height * op->kernel_width, reads = depthwise ? kernel : op->sources * kernel;
  int32_t width = (op->out_width + LANES - 1) / LANES * LANES;
  int32_t step = pitch(op->height, op->width), out_step = pitch(op->out_height, op->out_width);
  for (int32_t first = 0; first < (depthwise ? op->targets : 1); first++)
    for (int32_t y = 0; y < op->out_height; y++) {
      float *line = scratch;
      for (int32_t s = 0; s < (depthwise ? 1 : op->sources); s++)
        for (int32_t ky = 0; ky < op->kernel_height; ky++)
          for (int32_t kx = 0; kx < op->kernel_width; kx++, line += width) {
            int32_t row = y * op->stride_y + ky - op->pad_y, from = kx - op->pad_x;
            if (row < 0 || row >= op->height) {
              memset(line, 0, sizeof(float) * (size_t)width);
              continue;
            }
            const float *source = in + (depthwise ? first : s) * places + (int64_t)row * step;
            int32_t low = 0, high = op->out_width; /* the targets whose source lies inside */
            while (low < high && low * op->stride_x + from < 0) low++;
            while (high > low && (high - 1) * op->stride_x + from >= op->width) high--;
            for (int32_t x = 0; x < low; x++) line[x] = 0.0f;
            if (op->stride_x == 1)
              for (int32_t x = low; x < high; x++) line[x] = source[x + from];
            else if (op->stride_x == 2)
              for (int32_t x = low; x < high; x++) line[x] = source[2 * x + from];
            else
              for (int32_t x = low; x < high; x++) line[x] = source[(int64_t)x * op->stride_x + from];
            for (int32_t x = high; x < width; x++) line[x] = 0.0f;
          }
      for (int32_t t = first; t < (depthwise ? first + 1 : op->targets); t++) {
        const float *weight = op->weight + (int64_t)t * reads;
        float *target = out + t * out_places + (int64_t)y * out_step;
        int32_t x = 0;
        for (; x + TILE * LANES <= op->out_width; x += TILE * LANES) {
          vec sum0 = (op->shift ? op->shift[t] : 0.0f) + (vec){0}, sum1 = sum0, sum2 = sum0, sum3 = sum0;
          const float *places_read = scratch + x;
          for (int32_t r = 0; r < reads; r++, places_read += width) {
            const vec *read = (const vec *)places_read;
            sum0 += weight[r] * read[0], sum1 += weight[r] * read[1], sum2 += weight[r] * read[2], sum3 += weight[r] * read[3];
          }
          vec *written = (vec *)(target + x);
          written[0] = sum0, written[1] = sum1, written[2] = sum2, written[3] = sum3;
        }
        for (; x < op->out_width; x += LANES) {
          vec sum = (op->shift ? op->shift[t] : 0.0f) + (vec){0};
          for (int32_t r = 0; r < reads; r++) sum += weight[r] * *(const vec *)(scratch + (int64_t)r * width + x);
          int32_t count = op->out_width - x < LANES ? op->out_width - x : LANES;
          memcpy(target + x, &sum, sizeof(float) * (size_t)count);
        }
      }
    }
}

/* A node: scale and shift, ReLU, 3x3 convolution of each map by itself, padded by 1. The core is 1 where a float of a map means
 * something and 0 elsewhere; scratch holds one map with rows of zeros above and below. */
FAST static void node(const instruction *op, const float *in, float *out, float *scratch) {
  int64_t floats = plane(op->height, op->width), out_floats = plane(op->out_height, op->out_width);
  int32_t step = pitch(op->height, op->width), out_step = pitch(op->out_height, op->out_width);
  float *inside = scratch + LANES * ((step + 1 + LANES - 1) / LANES);
  memset(scratch, 0, sizeof(float) * (size_t)(inside - scratch));
  memset(inside + floats, 0, sizeof(float) * (size_t)(step + 1 + LANES));
  for (int32_t c = 0; c < op->targets; c++) {
    vec scale = op->scale[c] + (vec){0}, shift = op->shift[c] + (vec){0};
    const float *w = op->weight + 9 * c, *source = in + c * floats;
    for (int64_t i = 0; i < floats; i += LANES) {
      vec value = *(const vec *)(source + i) * scale + shift;
      value = (vec)((bits)value & (value > (vec){0}));
      *(vec *)(inside + i) = value * *(const vec *)(op->core + i);
    }
    float *target = out + c * out_floats;
    if (op->stride_x == 1 && op->stride_y == 1) {
      for (int64_t i = 0; i < floats; i += LANES) {
        const float *b = inside + i, *a = b - step, *d = b + step;
        vec sum = w[0] * *(const vec *)(a - 1) + w[1] * *(const vec *)a + w[2] * *(const vec *)(a + 1);
        sum += w[3] * *(const vec *)(b - 1) + w[4] * *(const vec *)b + w[5] * *(const vec *)(b + 1);
        sum += w[6] * *(const vec *)(d - 1) + w[7] * *(const vec *)d + w[8] * *(const vec *)(d + 1);
        *(vec *)(target + i) = sum;
      }
      continue;
    }
    for (int32_t y = 0; y < op->out_height; y++) {
      const float *b = inside + y * op->stride_y * step, *a = b - step, *d = b + step;
      float *row = target + y * out_step;
      if (op->stride_x == 2)
        for (int32_t x = 0; x < op->out_width; x++)
          row[x] = w[0] * a[2 * x - 1] + w[1] * a[2 * x] + w[2] * a[2 * x + 1] + w[3] * b[2 * x - 1] + w[4] * b[2 * x] +
                   w[5] * b[2 * x + 1] + w[6] * d[2 * x - 1] + w[7] * d[2 * x] + w[8] * d[2 * x + 1];
      else
        for (int32_t x = 0, i = 0; x < op->out_width; x++, i += op->stride_x)
          row[x] = w[0] * a[i - 1] + w[1] * a[i] + w[2] * a[i + 1] + w[3] * b[i - 1] + w[4] * b[i] + w[5] * b[i + 1] +
                   w[6] * d[i - 1] + w[7] * d[i] + w[8] * d[i + 1];
      target[y * out_step + op->out_width] = 0.0f;
    }
    for (int64_t i = (int64_t)op->out_height * out_step; i < out_floats; i++) target[i] = 0.0f;
  }
}

FAST static void mean(const instruction *op, const float *in, float *out) {
  int32_t bottom = op->stop < op->height ? op->stop : op->height, right = op->stop < op->width ? op->stop : op->width;
  float count = (float)(bottom - op->start) * (float)(right - op->start);
  for (int32_t c = 0; c < op->sources; c++) {
    const float *map = in + c * plane(op->height, op->width);
    float sum = 0;
    for (int32_t y = op->start; y < bottom; y++)
      for (int32_t x = op->start; x < right; x++) sum += map[y * pitch(op->height, op->width) + x];
    out[c] = sum / count;
  }
}

FAST static void linear(const instruction *op, const float *in, float *out) {
  for (int32_t t = 0; t < op->targets; t++) {
    const float *weight = op->weight + (int64_t)t * op->sources;
    vec sums = {0};
    int32_t s = 0;
    for (; s + LANES <= op->sources; s += LANES) sums += *(const vec *)(weight + s) * *(const vec *)(in + s);
    float sum = op->shift[t];
    for (int32_t i = 0; i < LANES; i++) sum += sums[i];
    for (; s < op->sources; s++) sum += weight[s] * in[s];
    out[t] = sum;
  }
}

/* Between maps as a user has them and maps in the arena. */
static void spread(const float *in, float *out, int32_t height, int32_t width) {
  for (int32_t y = 0; y < height; y++)
    memcpy(out + y * pitch(height, width), in + y * width, sizeof(float) * (size_t)width);
}

static void gather(const float *in, float *out, int32_t height, int32_t width) {
  for (int32_t y = 0; y < height; y++)
    memcpy(out + y * width, in + y * pitch(height, width), sizeof(float) * (size_t)width);
}

/* Constants come in as a user has them. */
static void restore(const instruction *op, const float *in, float *out) {
  int64_t stride = plane(op->out_height, op->out_width), places = (int64_t)op->out_height * op->out_width;
  for (int32_t t = 0; t < op->targets; t++)
    spread(op->core + t * places, out + t * stride, op->out_height, op->out_width);
  for (int32_t m = 0; m < op->maps; m++)
    memcpy(out + op->channels[m] * stride, in + m * stride, sizeof(float) * (size_t)stride);
}

static void pick(const instruction *op, const float *in, float *out) {
  int64_t places = plane(op->height, op->width);
  for (int32_t m = 0; m < op->maps; m++)
    memcpy(out + m * places, in + op->channels[m] * places, sizeof(float) * (size_t)places);
}

static void run_one(const instruction *op, float *arena) {
  const float *in = arena + op->from;
  float *out = arena + op->to, *scratch = arena + op->scratch;
  switch (op->kind) {
    case EDGES: edges(op, in, out), add_constants(op, out); break;
    case AFFINE: affine(op, in, out); break;
    case INSTANCE_NORM: instance_norm(op, in, out); break;
    case RECTIFY: rectify(op, in, out); break;
    case DEPTHWISE: convolution(op, in, out, scratch, 1), add_constants(op, out); break;
    case CONVOLUTION: convolution(op, in, out, scratch, 0), add_constants(op, out); break;
    case NODE: node(op, in, out, scratch); break;
    case MEAN: mean(op, in, out); break;
    case LINEAR: linear(op, in, out); break;
    case RESTORE: restore(op, in, out); break;
    case PICK: pick(op, in, out); break;
  }
}

/* Runs a program on some images: from the input of each to its output, by way of an arena of one image. Sizes are channels,
 * height and width. */
void dnw_run(const instruction *program, int32_t length, const float *input, float *output, float *arena, int64_t images,
             const int32_t *in_size, const int32_t *out_size, int64_t output_at) {
  int64_t in_places = (int64_t)in_size[1] * in_size[2], out_places = (int64_t)out_size[1] * out_size[2];
  for (int64_t i = 0; i < images; i++) {
    for (int32_t c = 0; c < in_size[0]; c++, input += in_places)
      spread(input, arena + c * plane(in_size[1], in_size[2]), in_size[1], in_size[2]);
    for (int32_t n = 0; n < length; n++) run_one(program + n, arena);
    for (int32_t c = 0; c < out_size[0]; c++, output += out_places)
      gather(arena + output_at + c * plane(out_size[1], out_size[2]), output, out_size[1], out_size[2]);
  }
}
