/* The kernels for vectors of LANES floats; _kernels.c includes this once for each width. */

typedef float WIDTH(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t WIDTH(bits) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define vec WIDTH(vec)
#define bits WIDTH(bits)

#if LANES == 16
#define TILE 7       /* vectors of sums held in registers */
#define PAIR_TILE 7  /* the same for two targets at once */
#define GROUP_TILE 6 /* and for four */
#define LATER 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30
#define EARLIER 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define TILE 14
#define PAIR_TILE 6
#define GROUP_TILE 3
#define LATER 7, 8, 9, 10, 11, 12, 13, 14
#define EARLIER 1, 2, 3, 4, 5, 6, 7, 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define TILE 14
#define PAIR_TILE 6
#define GROUP_TILE 3
#define LATER 3, 4, 5, 6
#define EARLIER 1, 2, 3, 4
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (bits){__VA_ARGS__})
#endif

INLINE FAST vec WIDTH(read)(const float *at) { return *(const vec *)at; }

INLINE FAST void WIDTH(write)(float *at, vec value) { *(vec *)at = value; }

INLINE FAST vec WIDTH(rectified)(vec value) { return (vec)((bits)value & ~(value <= (vec){0})); }

INLINE FAST vec WIDTH(masked)(vec value, const int32_t *mask) { return (vec)((bits)value & *(const bits *)mask); }

#define read WIDTH(read)
#define write WIDTH(write)
#define rectified WIDTH(rectified)
#define masked WIDTH(masked)

/* out[t] = base[t] + sum of weight * in[source] over the edges of t, n vectors of places in registers. */
INLINE FAST void WIDTH(edges_tile)(const instruction *op, const float *in, const float *second, float *out, const float *added,
                                   const int32_t *mask, int32_t low, int32_t high, const int n) {
  for (int32_t t = low; t < high; t++) {
    vec sum[TILE];
    float base = op->shift ? op->shift[t] : 0.0f;
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) sum[k] = base + (vec){0};
    if (op->channels && op->channels[t] >= 0) {
      const float *map = added + (int64_t)op->channels[t] * op->maps;
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[k] += read(map + k * LANES);
    }
    int32_t e = op->starts[t];
    for (int32_t stop = op->middles[t]; e < stop; e++) {
      const float *source = in + op->offsets[e], weight = op->weight[e];
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[k] += weight * read(source + k * LANES);
    }
    for (int32_t stop = op->starts[t + 1]; e < stop; e++) {
      const float *source = second + op->offsets[e], weight = op->weight[e];
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[k] += weight * read(source + k * LANES);
    }
    float *target = out + (int64_t)t * op->out_plane;
    if (op->relu) {
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[k] = rectified(sum[k]);
    }
    if (op->mask) {
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[k] = masked(sum[k], mask + k * LANES);
    }
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) write(target + k * LANES, sum[k]);
  }
}

/* Sums of maps that are single numbers. */
static FAST void WIDTH(edges_of_numbers)(const instruction *op, const float *in, const float *second, float *out, int32_t low,
                                         int32_t high) {
  for (int32_t t = low; t < high; t++) {
    float sum = op->shift ? op->shift[t] : 0.0f;
    if (op->channels && op->channels[t] >= 0) sum += op->added[(int64_t)op->channels[t] * op->maps];
    int32_t e = op->starts[t];
    for (; e < op->middles[t]; e++) sum += op->weight[e] * in[op->offsets[e]];
    for (; e < op->starts[t + 1]; e++) sum += op->weight[e] * second[op->offsets[e]];
    out[t] = op->relu && sum <= 0.0f ? 0.0f : sum;
  }
}

static FAST void WIDTH(edges)(const instruction *op, const call *now, const place *here) {
  int32_t low = share(op->targets, here->part, here->parts), high = share(op->targets, here->part + 1, here->parts);
  int64_t start = (int64_t)now->first * op->pitch, floats = (int64_t)now->rows * op->pitch, done = 0;
  const float *in = here->arena + (now->from + start), *second = here->arena + (now->second + start);
  float *out = here->arena + (now->to + start);
  const float *added = op->added ? op->added + start : 0;
  if (op->out_plane == 1) {
    WIDTH(edges_of_numbers)(op, in, second, out, low, high);
    return;
  }
  int64_t vectors = (floats + LANES - 1) / LANES, tiles = (vectors + TILE - 1) / TILE;
  for (int64_t tile = 0; tile < tiles; tile++) {
    int n = (int)((vectors - done + tiles - tile - 1) / (tiles - tile));
    int64_t at = done * LANES;
#define CASE(n) \
  case n: \
    WIDTH(edges_tile)(op, in + at, second + at, out + at, added ? added + at : 0, op->mask ? op->mask + at : 0, low, high, n); \
    break;
    switch (n) {
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#if TILE > 7
      CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
    }
#undef CASE
    done += n;
  }
}

/* The same where nearly all sources are read: four targets share what they load. Weights lie [group][source][4]. */
INLINE FAST void WIDTH(matrix_tile)(const instruction *op, const float *in, const float *second, float *out, const float *added,
                                    const int32_t *mask, int32_t low, int32_t high, const int n) {
  for (int32_t group = low; group < high; group++) {
    vec sum[4][GROUP_TILE];
    const float *weight = op->weight + (int64_t)group * 4 * (op->sources + op->others);
    int32_t count = op->targets - 4 * group < 4 ? op->targets - 4 * group : 4;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[i][k] = (vec){0};
    }
    for (int32_t s = 0; s < op->sources + op->others; s++, weight += 4) {
      const float *source = s < op->sources ? in + (int64_t)s * op->plane : second + (int64_t)(s - op->sources) * op->second_plane;
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) {
        vec value = read(source + k * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i][k] += weight[i] * value;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      if (i >= count) break;
      int32_t t = 4 * group + i;
      float *target = out + (int64_t)t * op->out_plane, base = op->shift ? op->shift[t] : 0.0f;
      const float *map = op->channels && op->channels[t] >= 0 ? added + (int64_t)op->channels[t] * op->maps : 0;
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) {
        vec value = sum[i][k] + base;
        if (map) value += read(map + k * LANES);
        if (op->relu) value = rectified(value);
        if (op->mask) value = masked(value, mask + k * LANES);
        write(target + k * LANES, value);
      }
    }
  }
}

static FAST void WIDTH(matrix)(const instruction *op, const call *now, const place *here) {
  int32_t groups = (op->targets + 3) / 4, low = share(groups, here->part, here->parts);
  int32_t high = share(groups, here->part + 1, here->parts);
  int64_t start = (int64_t)now->first * op->pitch, floats = (int64_t)now->rows * op->pitch, done = 0;
  const float *in = here->arena + (now->from + start), *second = here->arena + (now->second + start);
  float *out = here->arena + (now->to + start);
  const float *added = op->added ? op->added + start : 0;
  if (op->out_plane == 1) {
    for (int32_t t = 4 * low; t < 4 * high && t < op->targets; t++) {
      const float *weight = op->weight + (int64_t)(t / 4) * 4 * (op->sources + op->others) + t % 4;
      float sum = op->shift ? op->shift[t] : 0.0f;
      if (op->channels && op->channels[t] >= 0) sum += added[(int64_t)op->channels[t] * op->maps];
      for (int32_t s = 0; s < op->sources; s++, weight += 4) sum += *weight * in[s];
      for (int32_t s = 0; s < op->others; s++, weight += 4) sum += *weight * second[s];
      out[t] = op->relu && sum <= 0.0f ? 0.0f : sum;
    }
    return;
  }
  int64_t vectors = (floats + LANES - 1) / LANES, tiles = (vectors + GROUP_TILE - 1) / GROUP_TILE;
  for (int64_t tile = 0; tile < tiles; tile++) {
    int n = (int)((vectors - done + tiles - tile - 1) / (tiles - tile));
    int64_t at = done * LANES;
#define CASE(n) \
  case n: \
    WIDTH(matrix_tile)(op, in + at, second + at, out + at, added ? added + at : 0, op->mask ? op->mask + at : 0, low, high, n); \
    break;
    switch (n) {
      CASE(1) CASE(2) CASE(3)
#if GROUP_TILE > 3
      CASE(4) CASE(5) CASE(6)
#endif
    }
#undef CASE
    done += n;
  }
}

/* Rows of a map that a kernel works on where it lies, or into another place. */
static FAST void WIDTH(affine)(const instruction *op, const call *now, const place *here) {
  for (int32_t c = share(op->targets, here->part, here->parts); c < share(op->targets, here->part + 1, here->parts); c++) {
    const float *in = here->arena + (now->from + (int64_t)c * op->plane);
    float *out = here->arena + (now->to + (int64_t)c * op->out_plane);
    float scale = op->scale ? op->scale[c] : 1.0f, shift = op->shift ? op->shift[c] : 0.0f;
    for (int32_t y = 0; y < op->height; y++, in += op->pitch, out += op->pitch) {
      for (int32_t x = 0; x < op->width; x++) {
        float value = in[x] * scale + shift;
        out[x] = op->relu && value <= 0.0f ? 0.0f : value;
      }
      blank(out, op->width, op->pitch);
    }
  }
}

static FAST void WIDTH(instance_norm)(const instruction *op, const call *now, const place *here) {
  double places = (double)op->height * op->width;
  for (int32_t c = share(op->targets, here->part, here->parts); c < share(op->targets, here->part + 1, here->parts); c++) {
    const float *in = here->arena + (now->from + (int64_t)c * op->plane), *row = in;
    double sum = 0, squares = 0;
    for (int32_t y = 0; y < op->height; y++, row += op->pitch) {
      float part = 0; /* a row is short enough for floats */
      for (int32_t x = 0; x < op->width; x++) part += row[x];
      sum += part;
    }
    float mean = (float)(sum / places);
    row = in;
    for (int32_t y = 0; y < op->height; y++, row += op->pitch) {
      float part = 0;
      for (int32_t x = 0; x < op->width; x++) part += (row[x] - mean) * (row[x] - mean);
      squares += part;
    }
    float scale = (float)(op->scale[c] / sqrt(squares / places + op->eps)), shift = op->shift[c] - mean * scale;
    float *out = here->arena + (now->to + (int64_t)c * op->out_plane);
    for (int32_t y = 0; y < op->height; y++, in += op->pitch, out += op->pitch) {
      for (int32_t x = 0; x < op->width; x++) {
        float value = in[x] * scale + shift;
        out[x] = op->relu && value <= 0.0f ? 0.0f : value;
      }
      blank(out, op->width, op->pitch);
    }
  }
}

/* line[x] = source[x * stride + from] for a row of width floats, 0 beyond its ends. */
static FAST void WIDTH(line)(const float *source, float *line, int32_t width, int32_t targets, int32_t stride, int32_t from) {
  int32_t low = 0, high = targets; /* the targets whose source lies inside */
  while (low < high && low * stride + from < 0) low++;
  while (high > low && (high - 1) * stride + from >= width) high--;
  for (int32_t x = 0; x < low; x++) line[x] = 0.0f;
  int32_t x = low;
  if (stride == 1) {
    memcpy(line + low, source + low + from, sizeof(float) * (size_t)(high - low));
    x = high;
  } else if (stride == 2)
    for (; x + LANES <= high && 2 * x + from + 2 * LANES <= width; x += LANES)
      write(line + x, SHUFFLE(read(source + 2 * x + from), read(source + 2 * x + from + LANES), EVEN));
  for (; x < high; x++) line[x] = source[(int64_t)x * stride + from];
  for (x = high; x < (targets + LANES - 1) / LANES * LANES; x++) line[x] = 0.0f;
}

/* Sums of a row for `pair` targets, n vectors each, from the lines that they read. */
INLINE FAST void WIDTH(convolution_tile)(const instruction *op, const float *lines, int32_t top, int32_t width,
                                         int32_t sources, int32_t t, const int pair, const int n, vec *sums) {
  int32_t area = op->kernel_height * op->kernel_width;
  const float *weight = op->weight + (int64_t)t * sources * area;
  vec sum[2 * PAIR_TILE];
#pragma GCC unroll 16
  for (int k = 0; k < n; k++) sum[k] = (op->shift ? op->shift[t] : 0.0f) + (vec){0};
  if (pair) {
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) sum[n + k] = (op->shift ? op->shift[t + 1] : 0.0f) + (vec){0};
  }
  for (int32_t s = 0; s < sources; s++)
    for (int32_t ky = 0; ky < op->kernel_height; ky++) {
      int32_t slot = (top + ky) % op->kernel_height;
      const float *line = lines + (int64_t)(s * op->kernel_height + slot) * op->kernel_width * width;
      for (int32_t kx = 0; kx < op->kernel_width; kx++, line += width, weight++) {
        float one = weight[0], other = pair ? weight[sources * area] : 0.0f;
#pragma GCC unroll 16
        for (int k = 0; k < n; k++) {
          vec value = read(line + k * LANES);
          sum[k] += one * value;
          if (pair) sum[n + k] += other * value;
        }
      }
    }
#pragma GCC unroll 16
  for (int k = 0; k < n; k++) sums[k] = sum[k];
  if (pair) {
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) sums[n + k] = sum[n + k];
  }
}

/* Row by row: the places that a row of targets reads lie side by side in scratch; lines stay there while they are read. */
static FAST void WIDTH(convolution)(const instruction *op, const call *now, const place *here, const int depthwise) {
  const float *in = (op->outside ? here->input : here->arena) + now->from;
  int32_t low = share(op->targets, here->part, here->parts), high = share(op->targets, here->part + 1, here->parts);
  int32_t sources = depthwise ? 1 : op->sources, width = (op->out_width + LANES - 1) / LANES * LANES;
  int32_t vectors = width / LANES, kernel = op->kernel_height;
  for (int32_t first = low; first < (depthwise ? high : low + 1); first++) {
    int32_t known = -op->pad_y - 1; /* rows up to this one have lines */
    for (int32_t y = now->first; y < now->first + now->rows; y++) {
      int32_t top = y * op->stride_y - op->pad_y;
      if (y == now->first && known < top - 1) known = top - 1;
      for (int32_t row = known + 1 > top ? known + 1 : top; row < top + kernel; row++)
        for (int32_t s = 0; s < sources; s++) {
          float *line = here->scratch + (int64_t)(s * kernel + (row + op->pad_y) % kernel) * op->kernel_width * width;
          const float *source = in + ((int64_t)(depthwise ? first : s) * op->plane + (int64_t)row * op->pitch);
          for (int32_t kx = 0; kx < op->kernel_width; kx++, line += width)
            if (row < 0 || row >= op->height)
              memset(line, 0, sizeof(float) * (size_t)width);
            else
              WIDTH(line)(source, line, op->width, op->out_width, op->stride_x, kx - op->pad_x);
        }
      known = top + kernel - 1;
      for (int32_t t = depthwise ? first : low, stop = depthwise ? first + 1 : high; t < stop;) {
        int pair = t + 1 < stop;
        int32_t done = 0, tiles = (vectors + PAIR_TILE - 1) / PAIR_TILE;
        for (int32_t tile = 0; tile < tiles; tile++) {
          int n = (vectors - done + tiles - tile - 1) / (tiles - tile);
          const float *lines = here->scratch + done * LANES;
          vec sums[2 * PAIR_TILE];
#define CASE(n) \
  case n: \
    if (pair) \
      WIDTH(convolution_tile)(op, lines, top + op->pad_y, width, sources, t, 1, n, sums); \
    else \
      WIDTH(convolution_tile)(op, lines, top + op->pad_y, width, sources, t, 0, n, sums); \
    break;
          switch (n) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if PAIR_TILE > 6
            CASE(7)
#endif
          }
#undef CASE
          for (int32_t i = 0; i < 1 + pair; i++) {
            int64_t at = now->to + (int64_t)(t + i) * op->out_plane + (int64_t)y * op->out_pitch;
            const float *map = op->channels && op->channels[t + i] >= 0
                                   ? op->added + (int64_t)op->channels[t + i] * op->maps + (int64_t)y * op->out_pitch
                                   : 0;
            for (int k = 0; k < n; k++) {
              int32_t x = (done + k) * LANES, count = op->out_pitch - x < LANES ? op->out_pitch - x : LANES;
              vec sum = sums[i * n + k];
              if (map) {
                vec more = {0};
                memcpy(&more, map + x, sizeof(float) * (size_t)count);
                sum += more;
              }
              if (op->relu) sum = rectified(sum);
              if (op->mask) sum = masked(sum, op->mask + x);
              if (count == LANES)
                write(here->arena + at + x, sum);
              else
                memcpy(here->arena + at + x, &sum, sizeof(float) * (size_t)count);
            }
          }
          done += n;
        }
        for (int32_t i = 0; i < 1 + pair; i++)
          blank(here->arena + (now->to + (int64_t)(t + i) * op->out_plane + (int64_t)y * op->out_pitch), width, op->out_pitch);
        t += 1 + pair;
      }
    }
  }
}

/* What the columns to the left, above and to the right contribute to a vector of places. */
#define COLUMNS(a, b, d) \
  left = w[0] * (a) + w[3] * (b) + w[6] * (d), middle = shift + w[1] * (a) + w[4] * (b) + w[7] * (d), \
  right = w[2] * (a) + w[5] * (b) + w[8] * (d)

INLINE FAST vec WIDTH(finished)(const instruction *op, vec sum, int64_t at) {
  if (op->relu) sum = rectified(sum);
  return op->mask ? masked(sum, op->mask + at) : sum;
}

/* A convolution of 3x3 places, map by map, padded by 1 and of stride 1 or 2. Its maps have a halo: the zeros above, below and
 * beyond the ends of rows are its padding. */
static FAST void WIDTH(node)(const instruction *op, const call *now, const place *here) {
  int32_t pitch = op->pitch, stride = op->stride_y;
  for (int32_t c = share(op->targets, here->part, here->parts); c < share(op->targets, here->part + 1, here->parts); c++) {
    const float *in = here->arena + (now->from + (int64_t)c * op->plane + (int64_t)now->first * stride * pitch);
    float *out = here->arena + (now->to + (int64_t)c * op->out_plane + (int64_t)now->first * op->out_pitch);
    const float *w = op->weight + 9 * (int64_t)c;
    float shift = op->shift ? op->shift[c] : 0.0f;
    vec left, middle, right;
    if (stride == 2)
      for (int32_t y = 0; y < now->rows; y++, in += 2 * pitch, out += op->out_pitch) {
        vec before = {0};
        int32_t x = 0;
        for (; x < op->out_width; x += LANES) {
          const float *b = in + 2 * x, *a = b - pitch, *d = b + pitch;
          vec a0 = read(a), a1 = read(a + LANES), b0 = read(b), b1 = read(b + LANES), d0 = read(d), d1 = read(d + LANES);
          vec ao = SHUFFLE(a0, a1, ODD), bo = SHUFFLE(b0, b1, ODD), to = SHUFFLE(d0, d1, ODD);
          left = w[0] * ao + w[3] * bo + w[6] * to;
          vec sum = shift + w[2] * ao + w[5] * bo + w[8] * to;
          sum += w[1] * SHUFFLE(a0, a1, EVEN) + w[4] * SHUFFLE(b0, b1, EVEN) + w[7] * SHUFFLE(d0, d1, EVEN);
          sum = WIDTH(finished)(op, sum + SHUFFLE(before, left, LATER), x);
          before = left;
          if (op->out_pitch - x >= LANES)
            write(out + x, sum);
          else
            memcpy(out + x, &sum, sizeof(float) * (size_t)(op->out_pitch - x));
        }
        blank(out, x, op->out_pitch);
      }
    else if (pitch % LANES == 0)
      for (int32_t y = 0; y < now->rows; y++, in += pitch, out += pitch) {
        vec before = {0};
        COLUMNS(read(in - pitch), read(in), read(in + pitch));
        for (int32_t x = LANES; x < pitch; x += LANES) {
          vec sum = middle + SHUFFLE(before, left, LATER), old = right;
          before = left;
          COLUMNS(read(in + x - pitch), read(in + x), read(in + x + pitch));
          write(out + x - LANES, WIDTH(finished)(op, sum + SHUFFLE(old, right, EARLIER), x - LANES));
        }
        vec sum = middle + SHUFFLE(before, left, LATER) + SHUFFLE(right, (vec){0}, EARLIER);
        write(out + pitch - LANES, WIDTH(finished)(op, sum, pitch - LANES));
      }
    else { /* several rows in a vector */
      vec before = {0};
      bits has_left, has_right;
      for (int32_t i = 0; i < LANES; i++) has_left[i] = -(i % pitch != 0), has_right[i] = -(i % pitch != pitch - 1);
      COLUMNS(read(in - pitch), read(in), read(in + pitch));
      for (int32_t at = 0; at < now->rows * pitch; at += LANES) {
        vec sum = middle + (vec)((bits)SHUFFLE(before, left, LATER) & has_left), old = right;
        const float *next = in + at + LANES;
        before = left;
        COLUMNS(read(next - pitch), read(next), read(next + pitch));
        sum += (vec)((bits)SHUFFLE(old, right, EARLIER) & has_right);
        write(out + at, WIDTH(finished)(op, sum, at));
      }
    }
  }
}

/* The mean of the places that the mask keeps; eps is one over their number. */
static FAST void WIDTH(mean)(const instruction *op, const call *now, const place *here) {
  for (int32_t c = share(op->targets, here->part, here->parts); c < share(op->targets, here->part + 1, here->parts); c++) {
    const float *map = here->arena + (now->from + (int64_t)c * op->plane);
    int32_t floats = op->height * op->pitch, at = 0;
    vec sums = {0};
    for (; at + LANES <= floats; at += LANES) sums += masked(read(map + at), op->mask + at);
    float sum = 0;
    for (int32_t i = 0; i < LANES; i++) sum += sums[i];
    for (; at < floats; at++) sum += op->mask[at] ? map[at] : 0.0f;
    here->arena[now->to + c] = sum * op->eps;
  }
}

static FAST void WIDTH(linear)(const instruction *op, const call *now, const place *here) {
  const float *in = here->arena + now->from;
  for (int32_t t = share(op->targets, here->part, here->parts); t < share(op->targets, here->part + 1, here->parts); t++) {
    const float *weight = op->weight + (int64_t)t * op->sources;
    vec sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0};
    int32_t s = 0;
    for (; s + 4 * LANES <= op->sources; s += 4 * LANES) {
      sum0 += read(weight + s) * read(in + s), sum1 += read(weight + s + LANES) * read(in + s + LANES);
      sum2 += read(weight + s + 2 * LANES) * read(in + s + 2 * LANES);
      sum3 += read(weight + s + 3 * LANES) * read(in + s + 3 * LANES);
    }
    sum0 += sum1 + (sum2 + sum3);
    float sum = op->shift[t];
    for (int32_t i = 0; i < LANES; i++) sum += sum0[i];
    for (; s < op->sources; s++) sum += weight[s] * in[s];
    here->arena[now->to + t] = op->relu && sum <= 0.0f ? 0.0f : sum;
  }
}

/* Maps to other places: those that come in, at the channels that they are for (of the source if it has more, else of the target),
 * on maps that are constant. Without channels, one after the other. */
static FAST void WIDTH(copy)(const instruction *op, const call *now, const place *here, const int from_outside, const int to_outside) {
  const float *in = (from_outside ? here->input : here->arena) + now->from;
  float *out = (to_outside ? here->output : here->arena) + now->to;
  for (int32_t t = share(op->targets, here->part, here->parts); t < share(op->targets, here->part + 1, here->parts); t++) {
    const float *map = !op->channels ? in + (int64_t)t * op->plane
                       : op->channels[t] >= 0 ? in + (int64_t)op->channels[t] * op->plane : 0;
    int32_t pitch = map ? op->pitch : op->width;
    if (!map) map = op->added + (int64_t)t * op->maps;
    float *target = out + (int64_t)t * op->out_plane;
    for (int32_t y = 0; y < op->height; y++, map += pitch, target += op->out_pitch) {
      memcpy(target, map, sizeof(float) * (size_t)op->width);
      blank(target, op->width, op->out_pitch);
    }
  }
}

/* Rows that are 0, or that move to where they are still needed. */
static FAST void WIDTH(move)(const instruction *op, const call *now, const place *here) {
  int64_t start = (int64_t)now->first * op->out_pitch;
  size_t bytes = sizeof(float) * (size_t)now->rows * (size_t)op->out_pitch;
  for (int32_t t = share(op->targets, here->part, here->parts); t < share(op->targets, here->part + 1, here->parts); t++) {
    float *to = here->arena + (now->to + start + (int64_t)t * op->out_plane);
    if (op->kind == ZERO)
      memset(to, 0, bytes);
    else
      memmove(to, here->arena + (now->from + start + (int64_t)t * op->out_plane), bytes);
  }
}

static FAST void WIDTH(run)(const instruction *op, const call *now, const place *here) {
  switch (op->kind) {
    case SPREAD: WIDTH(copy)(op, now, here, 1, 0); break;
    case EDGES: WIDTH(edges)(op, now, here); break;
    case MATRIX: WIDTH(matrix)(op, now, here); break;
    case AFFINE: case RECTIFY: WIDTH(affine)(op, now, here); break;
    case INSTANCE_NORM: WIDTH(instance_norm)(op, now, here); break;
    case DEPTHWISE: WIDTH(convolution)(op, now, here, 1); break;
    case CONVOLUTION: WIDTH(convolution)(op, now, here, 0); break;
    case NODE: WIDTH(node)(op, now, here); break;
    case MEAN: WIDTH(mean)(op, now, here); break;
    case LINEAR: WIDTH(linear)(op, now, here); break;
    case COPY: WIDTH(copy)(op, now, here, 0, 0); break;
    case ZERO: case SLIDE: WIDTH(move)(op, now, here); break;
    case GATHER: WIDTH(copy)(op, now, here, 0, 1); break;
  }
}

#undef vec
#undef bits
#undef read
#undef write
#undef rectified
#undef masked
#undef TILE
#undef PAIR_TILE
#undef GROUP_TILE
#undef LATER
#undef EARLIER
#undef EVEN
#undef ODD
#undef COLUMNS
#undef SHUFFLE
#undef LANES
#undef WIDTH
#undef FAST
