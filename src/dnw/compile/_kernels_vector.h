/* The kernels for vectors of LANES floats; _kernels.c says what tasks and calls are. */

#if LANES == 16
#define GROUP_TILE 6 /* vectors of sums of four targets that registers hold */
#define LATER 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30
#define EARLIER 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
#elif LANES == 8
#define GROUP_TILE 3
#define LATER 7, 8, 9, 10, 11, 12, 13, 14
#define EARLIER 1, 2, 3, 4, 5, 6, 7, 8
#else
#define GROUP_TILE 3
#define LATER 3, 4, 5, 6
#define EARLIER 1, 2, 3, 4
#endif

INLINE FAST vec WIDTH(read)(const float *at) { return *(const vec *)at; }

INLINE FAST void WIDTH(write)(float *at, vec value) { *(vec *)at = value; }

INLINE FAST vec WIDTH(masked)(vec value, const int32_t *mask) { return (vec)((bits)value & *(const bits *)mask); }

#define read WIDTH(read)
#define write WIDTH(write)
#define masked WIDTH(masked)

/* Where the mask is set from one, elsewhere from the other. */
INLINE FAST vec WIDTH(chosen)(bits mask, vec one, vec other) { return (vec)(((bits)one & mask) | ((bits)other & ~mask)); }
#define chosen WIDTH(chosen)

/* e to the power of x, within two units in the last place; NaN of NaN. */
INLINE FAST vec WIDTH(exponential)(vec x) {
  x = chosen(x < -87.0f, (vec){0} - 87.0f, chosen(x > 88.0f, (vec){0} + 88.0f, x));
  vec whole = chosen(x == x, x, (vec){0}) * 1.44269504f + 12582912.0f; /* its last bits are the whole number */
  vec power = (vec)(((bits)whole << 23) + 0x3f800000);                 /* two to the power of that */
  whole -= 12582912.0f;
  vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f, sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f, sum = sum * rest + 4.1665795894e-2f, sum = sum * rest + 1.6666665459e-1f;
  return ((sum * rest + 5.0000001201e-1f) * rest * rest + rest + 1.0f) * power;
}
#define exponential WIDTH(exponential)

/* The same less one, without losing the digits of small numbers. */
INLINE FAST vec WIDTH(grown)(vec x) {
  vec sum = x * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * x + 8.3334519073e-3f, sum = sum * x + 4.1665795894e-2f, sum = sum * x + 1.6666665459e-1f;
  sum = (sum * x + 5.0000001201e-1f) * x * x + x;
  return chosen((x > -0.3f) & (x < 0.3f), sum, exponential(x) - 1.0f);
}

/* The hyperbolic tangent, to a few units in the last place. */
INLINE FAST vec WIDTH(hyperbolic_tangent)(vec x) {
  vec twice = WIDTH(grown)(2.0f * x);
  return twice / (twice + 2.0f);
}

/* x / (1 + e to the power of -x), within 2e-6 of it; NaN of NaN. The polynomial is two to the power of the rest. */
INLINE FAST vec WIDTH(silu)(vec x) {
  vec power = -1.44269504f * x, bounded = chosen(power > -126.0f, power, (vec){0} - 126.0f);
  bounded = chosen(bounded < 126.0f, bounded, (vec){0} + 126.0f);
  vec whole = bounded + 12582912.0f, scale = (vec)(((bits)whole << 23) + 0x3f800000);
  vec rest = bounded - (whole - 12582912.0f), sum = rest * 1.326697039e-3f + 9.675459746e-3f;
  sum = sum * rest + 5.550742616e-2f, sum = sum * rest + 2.402212175e-1f, sum = sum * rest + 6.931469492e-1f;
  return x / ((sum * rest + 1.0f) * scale + 1.0f);
}

/* The error function, within 1.2e-7 (Abramowitz and Stegun 7.1.26). */
INLINE FAST vec WIDTH(erf)(vec x) {
  vec size = (vec)((bits)x & 0x7fffffff), t = 1.0f / (1.0f + 0.3275911f * size);
  vec sum = 1.061405429f * t - 1.453152027f;
  sum = sum * t + 1.421413741f, sum = sum * t - 0.284496736f, sum = (sum * t + 0.254829592f) * t;
  vec found = 1.0f - sum * exponential((vec){0} - size * size);
  return (vec)((bits)found | ((bits)x & ~(bits)((bits){0} + 0x7fffffff)));
}

/* What an activation makes of sums. Where its kind is a constant, nothing else of this is left. */
INLINE FAST vec WIDTH(activated)(const struct task *task, vec x, const int kind) {
  vec first = task->first + (vec){0}, second = task->second + (vec){0};
  switch (kind) {
    case ACTIVATION(relu): return rectified(x);
    case ACTIVATION(clamp): return x = chosen(x < first, first, x), chosen(x > second, second, x);
    case ACTIVATION(leaky_relu): return chosen(x < 0.0f, first * x, x);
    case ACTIVATION(elu): return chosen(x < 0.0f, first * WIDTH(grown)(x), x);
    case ACTIVATION(sigmoid): return 1.0f / (1.0f + exponential((vec){0} - x));
    case ACTIVATION(tanh): return WIDTH(hyperbolic_tangent)(x);
    case ACTIVATION(silu): return WIDTH(silu)(x);
    case ACTIVATION(hardswish):
    case ACTIVATION(hardsigmoid): {
      vec gate = x + 3.0f;
      gate = chosen(gate < 0.0f, (vec){0}, gate), gate = chosen(gate > 6.0f, (vec){0} + 6.0f, gate) * (1.0f / 6.0f);
      if (kind == ACTIVATION(hardswish)) gate *= x;
      return gate;
    }
    case ACTIVATION(gelu): return 0.5f * x * (1.0f + WIDTH(erf)(x * 0.70710678f));
    case ACTIVATION(gelu_tanh): return x / (1.0f + exponential(-1.5957691f * (x + 0.044715f * x * x * x)));
    default: return x;
  }
}

static FAST float WIDTH(activated_number)(const struct task *task, float x) {
  return WIDTH(activated)(task, x + (vec){0}, task->activation)[0];
}

/* The activation of vectors that lie in memory, and the mask. */
static FAST void WIDTH(activate)(const struct task *task, float *at, const int32_t *mask, const int64_t n) {
#define CASE(kind) \
  case ACTIVATION(kind): \
    for (int64_t k = 0; k < n; k++) { \
      vec value = WIDTH(activated)(task, read(at + k * LANES), ACTIVATION(kind)); \
      write(at + k * LANES, mask ? masked(value, mask + k * LANES) : value); \
    } \
    break;
  switch (task->activation) { ACTIVATIONS(CASE) }
#undef CASE
}

/* Scale and shift, map by map; the maps may be written where they lie. */
static FAST void WIDTH(affine)(const struct task *task, const struct call *call, const struct context *context) {
  for (int32_t c = begin(context, task->targets), stop = end(context, task->targets); c < stop; c++) {
    const float *in = context->arena + (call->in_offset + (int64_t)c * task->plane);
    float *out = context->arena + (call->out_offset + (int64_t)c * task->out_plane);
    float scale = task->scale ? task->scale[c] : 1.0f, shift = task->shift ? task->shift[c] : 0.0f;
    for (int32_t y = 0; y < task->height; y++, in += task->pitch, out += task->pitch) {
      for (int32_t x = 0; x < task->width; x++) {
        float value = in[x] * scale + shift;
        out[x] = task->relu && value <= 0.0f ? 0.0f : value;
      }
      blank(out, task->width, task->pitch);
    }
  }
}

static FAST void WIDTH(rectify)(const struct task *task, const struct call *call, const struct context *context) {
  WIDTH(affine)(task, call, context);
}

static FAST void WIDTH(instance_norm)(const struct task *task, const struct call *call, const struct context *context) {
  double pixels = (double)task->height * task->width;
  for (int32_t c = begin(context, task->targets), stop = end(context, task->targets); c < stop; c++) {
    const float *in = context->arena + (call->in_offset + (int64_t)c * task->plane), *row = in;
    double sum = 0, squares = 0;
    for (int32_t y = 0; y < task->height; y++, row += task->pitch) {
      float row_sum = 0; /* a row is short enough for floats */
      for (int32_t x = 0; x < task->width; x++) row_sum += row[x];
      sum += row_sum;
    }
    float mean = (float)(sum / pixels);
    row = in;
    for (int32_t y = 0; y < task->height; y++, row += task->pitch) {
      float row_squares = 0;
      for (int32_t x = 0; x < task->width; x++) row_squares += (row[x] - mean) * (row[x] - mean);
      squares += row_squares;
    }
    float scale = (float)(task->scale[c] / sqrt(squares / pixels + task->eps)), shift = task->shift[c] - mean * scale;
    float *out = context->arena + (call->out_offset + (int64_t)c * task->out_plane);
    for (int32_t y = 0; y < task->height; y++, in += task->pitch, out += task->pitch) {
      for (int32_t x = 0; x < task->width; x++) {
        float value = in[x] * scale + shift;
        out[x] = task->relu && value <= 0.0f ? 0.0f : value;
      }
      blank(out, task->width, task->pitch);
    }
  }
}

INLINE FAST vec WIDTH(finished)(const struct task *task, vec sum, int64_t at) {
  if (task->activation == ACTIVATION(relu))
    sum = rectified(sum);
  else if (task->activation == ACTIVATION(clamp))
    sum = WIDTH(activated)(task, sum, ACTIVATION(clamp));
  return task->mask ? masked(sum, task->mask + at) : sum;
}

/* What the columns to the left, above and to the right contribute to a vector of pixels. */
#define COLUMNS(a, b, d) \
  left = w[0] * (a) + w[3] * (b) + w[6] * (d), middle = shift + w[1] * (a) + w[4] * (b) + w[7] * (d), \
  right = w[2] * (a) + w[5] * (b) + w[8] * (d)

/* A convolution of 3x3 pixels, map by map, padded by 1 and of stride 1 or 2. Its maps have a halo: the zeros above, below and
 * beyond the ends of rows are its padding. */
static OVER_READS FAST void WIDTH(node)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t pitch = task->pitch, stride = task->stride_y;
  for (int32_t c = begin(context, task->targets), stop = end(context, task->targets); c < stop; c++) {
    const float *in = context->arena + (call->in_offset + (int64_t)c * task->plane + (int64_t)call->first * stride * pitch);
    float *out = context->arena + (call->out_offset + (int64_t)c * task->out_plane + (int64_t)call->first * task->out_pitch);
    const float *w = task->weight + 9 * (int64_t)c;
    float shift = task->shift ? task->shift[c] : 0.0f;
    float *made = out;
    vec left, middle, right;
    if (stride == 2)
      for (int32_t y = 0; y < call->rows; y++, in += 2 * pitch, out += task->out_pitch) {
        vec before = {0};
        int32_t x = 0;
        for (; x < task->out_width; x += LANES) {
          const float *b = in + 2 * x, *a = b - pitch, *d = b + pitch;
          vec a0 = read(a), a1 = read(a + LANES), b0 = read(b), b1 = read(b + LANES), d0 = read(d), d1 = read(d + LANES);
          vec ao = SHUFFLE(a0, a1, ODD), bo = SHUFFLE(b0, b1, ODD), to = SHUFFLE(d0, d1, ODD);
          left = w[0] * ao + w[3] * bo + w[6] * to;
          vec sum = shift + w[2] * ao + w[5] * bo + w[8] * to;
          sum += w[1] * SHUFFLE(a0, a1, EVEN) + w[4] * SHUFFLE(b0, b1, EVEN) + w[7] * SHUFFLE(d0, d1, EVEN);
          sum = WIDTH(finished)(task, sum + SHUFFLE(before, left, LATER), x);
          before = left;
          if (task->out_pitch - x >= LANES)
            write(out + x, sum);
          else
            memcpy(out + x, &sum, sizeof(float) * (size_t)(task->out_pitch - x));
        }
        blank(out, x, task->out_pitch);
      }
    else if (pitch % LANES == 0)
      for (int32_t y = 0; y < call->rows; y++, in += pitch, out += pitch) {
        vec before = {0};
        COLUMNS(read(in - pitch), read(in), read(in + pitch));
        for (int32_t x = LANES; x < pitch; x += LANES) {
          vec sum = middle + SHUFFLE(before, left, LATER), old = right;
          before = left;
          COLUMNS(read(in + x - pitch), read(in + x), read(in + x + pitch));
          write(out + x - LANES, WIDTH(finished)(task, sum + SHUFFLE(old, right, EARLIER), x - LANES));
        }
        vec sum = middle + SHUFFLE(before, left, LATER) + SHUFFLE(right, (vec){0}, EARLIER);
        write(out + pitch - LANES, WIDTH(finished)(task, sum, pitch - LANES));
      }
    else if (LANES % pitch) /* rows that end anywhere in a vector, with zeros between them */
      for (int32_t at = 0; at < call->rows * pitch; at += LANES) {
        const float *b = in + at - 1, *a = b - pitch, *d = b + pitch;
        vec sum = shift + (vec){0};
        for (int i = 0; i < 3; i++) sum += w[i] * read(a + i) + w[3 + i] * read(b + i) + w[6 + i] * read(d + i);
        write(out + at, WIDTH(finished)(task, sum, at));
      }
    else { /* several rows in a vector */
      vec before = {0};
      bits has_left, has_right;
      for (int32_t i = 0; i < LANES; i++) has_left[i] = -(i % pitch != 0), has_right[i] = -(i % pitch != pitch - 1);
      COLUMNS(read(in - pitch), read(in), read(in + pitch));
      for (int32_t at = 0; at < call->rows * pitch; at += LANES) {
        vec sum = middle + (vec)((bits)SHUFFLE(before, left, LATER) & has_left), old = right;
        const float *next = in + at + LANES;
        before = left;
        COLUMNS(read(next - pitch), read(next), read(next + pitch));
        sum += (vec)((bits)SHUFFLE(old, right, EARLIER) & has_right);
        write(out + at, WIDTH(finished)(task, sum, at));
      }
    }
    if (task->activation > ACTIVATION(clamp)) /* before the map leaves the nearest cache */
      WIDTH(activate)(task, made, task->mask, ((int64_t)call->rows * task->out_pitch + LANES - 1) / LANES);
  }
}

/* The mean of the pixels that the mask keeps. */
static FAST void WIDTH(mean)(const struct task *task, const struct call *call, const struct context *context) {
  for (int32_t c = begin(context, task->targets), stop = end(context, task->targets); c < stop; c++) {
    const float *map = context->arena + (call->in_offset + (int64_t)c * task->plane);
    int32_t floats = task->height * task->pitch, at = 0;
    vec sums = {0};
    for (; at + LANES <= floats; at += LANES) sums += masked(read(map + at), task->mask + at);
    float sum = 0;
    for (int32_t i = 0; i < LANES; i++) sum += sums[i];
    for (; at < floats; at++) sum += task->mask[at] ? map[at] : 0.0f;
    context->arena[call->out_offset + c] = sum * task->reciprocal;
  }
}

static FAST void WIDTH(linear)(const struct task *task, const struct call *call, const struct context *context) {
  const float *in = context->arena + call->in_offset;
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++) {
    const float *weight = task->weight + (int64_t)t * task->sources;
    vec sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0};
    int32_t s = 0;
    for (; s + 4 * LANES <= task->sources; s += 4 * LANES) {
      sum0 += read(weight + s) * read(in + s), sum1 += read(weight + s + LANES) * read(in + s + LANES);
      sum2 += read(weight + s + 2 * LANES) * read(in + s + 2 * LANES);
      sum3 += read(weight + s + 3 * LANES) * read(in + s + 3 * LANES);
    }
    sum0 += sum1 + (sum2 + sum3);
    float sum = task->shift[t];
    for (int32_t i = 0; i < LANES; i++) sum += sum0[i];
    for (; s < task->sources; s++) sum += weight[s] * in[s];
    context->arena[call->out_offset + t] = task->relu && sum <= 0.0f ? 0.0f : sum;
  }
}

/* Maps to where they are wanted, in the order of their targets: each from the source channel that is its own, or, where there
 * is none, from the maps that are added. Without source channels, one after the other. */
static FAST void WIDTH(move)(const struct task *task, const struct call *call, const float *from, float *to,
                             const struct context *context) {
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++) {
    int32_t source = task->source_channels ? task->source_channels[t] : t, pitch = source < 0 ? task->width : task->pitch;
    const float *map =
        source < 0 ? task->added + (int64_t)t * task->added_plane : from + (call->in_offset + (int64_t)source * task->plane);
    float *target = to + (call->out_offset + (int64_t)t * task->out_plane);
    for (int32_t y = 0; y < task->height; y++, map += pitch, target += task->out_pitch) {
      memcpy(target, map, sizeof(float) * (size_t)task->width);
      blank(target, task->width, task->out_pitch);
    }
  }
}

static FAST void WIDTH(copy)(const struct task *task, const struct call *call, const struct context *context) {
  WIDTH(move)(task, call, context->arena, context->arena, context);
}

/* From the images of a user. */
static FAST void WIDTH(spread)(const struct task *task, const struct call *call, const struct context *context) {
  WIDTH(move)(task, call, context->images, context->arena, context);
}

/* To the outputs of a user. */
static FAST void WIDTH(gather)(const struct task *task, const struct call *call, const struct context *context) {
  WIDTH(move)(task, call, context->arena, context->outputs, context);
}

/* Rows become 0. */
static FAST void WIDTH(zero)(const struct task *task, const struct call *call, const struct context *context) {
  int64_t start = call->out_offset + (int64_t)call->first * task->out_pitch;
  size_t bytes = sizeof(float) * (size_t)call->rows * (size_t)task->out_pitch;
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++)
    memset(context->arena + (start + (int64_t)t * task->out_plane), 0, bytes);
}

/* Rows move to where they are still needed, in the same maps. */
static FAST void WIDTH(slide)(const struct task *task, const struct call *call, const struct context *context) {
  int64_t start = (int64_t)call->first * task->out_pitch;
  size_t bytes = sizeof(float) * (size_t)call->rows * (size_t)task->out_pitch;
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++) {
    int64_t at = start + (int64_t)t * task->out_plane;
    memmove(context->arena + (call->out_offset + at), context->arena + (call->in_offset + at), bytes);
  }
}

#include "_kernels_layers.h"

static FAST void WIDTH(run)(const struct task *task, const struct call *call, const struct context *context) {
#define CASE(kind) \
  case KIND(kind): WIDTH(kind)(task, call, context); break;
  switch (task->kind) { KINDS(CASE) }
#undef CASE
}

#undef read
#undef write
#undef masked
#undef GROUP_TILE
#undef LATER
#undef EARLIER
#undef COLUMNS
#undef chosen
#undef exponential
