/* The kernels of graph.c for vectors of LANES floats. */

#define TILE 8 /* vectors of sums held in registers */

/* The first `many` floats at a place, and zeros. */
INLINE FAST vec WIDTH(read)(const float *at, const int many) {
  vec value = {0};
  if (many == LANES) return *(const vec *)at;
  memcpy(&value, at, 4 * (size_t)many);
  return value;
}

INLINE FAST void WIDTH(write)(float *at, vec value, const int many) {
  if (many == LANES)
    *(vec *)at = value;
  else
    memcpy(at, &value, 4 * (size_t)many);
}

/* The sum of the first `many` entries. */
INLINE FAST double WIDTH(total)(vec value, const int many) {
  double sum = 0;
  for (int i = 0; i < many; i++) sum += value[i];
  return sum;
}

#define read WIDTH(read)
#define write WIDTH(write)
#define total WIDTH(total)

/* The sum of (x - less) ^ power over n floats, power 1 or 2; in double precision from row to row. */
INLINE FAST double WIDTH(moment)(const float *x, int64_t n, float less, const int power) {
  double sum = 0;
  for (int64_t start = 0; start < n; start += 1024) {
    int64_t stop = start + 1024 < n ? start + 1024 : n, i = start;
    vec part[4] = {{0}, {0}, {0}, {0}};
    for (; i + 4 * LANES <= stop; i += 4 * LANES)
      for (int k = 0; k < 4; k++) {
        vec value = read(x + i + k * LANES, LANES) - less;
        part[k] += power == 1 ? value + 0.0f : value * value;
      }
    sum += total(part[0] + part[1] + (part[2] + part[3]), LANES);
    for (; i < stop; i++) {
      float value = x[i] - less;
      sum += power == 1 ? (double)value : (double)value * value;
    }
  }
  return sum;
}

/* The norm of one node for some images: y = x * factor + added. */
typedef struct {
  vec mean, deviation, factor, added;
} WIDTH(norm);
#define norm_of WIDTH(norm)

/* Statistics of a node over the whole batch, or of some of its images, as far as they are to be made. */
INLINE FAST void WIDTH(measure)(const nodes *op, const float *x, int64_t node, int64_t image, const int many) {
  int64_t pixels = op->height * op->width;
  vec sum = {0}, squares = {0};
  for (int64_t p = 0; p < pixels; p++) sum += read(x + p * op->images + image, many);
  vec mean = sum / (float)pixels;
  for (int64_t p = 0; p < pixels; p++) {
    vec value = read(x + p * op->images + image, many) - mean;
    squares += value * value;
  }
  for (int i = 0; i < many; i++) {
    op->mean[node * op->images + image + i] = mean[i];
    op->deviation[node * op->images + image + i] = (float)(1.0 / sqrt((double)squares[i] / (double)pixels + op->eps));
  }
}

INLINE FAST norm_of WIDTH(norm_at)(const nodes *op, int64_t node, int64_t image, const int many) {
  norm_of norm = {{0}, (vec){0} + 1.0f, (vec){0} + 1.0f, {0}};
  if (op->norm == NO_NORM) return norm;
  if (op->norm == INSTANCE_STATISTICS) {
    norm.mean = read(op->mean + node * op->images + image, many);
    norm.deviation = read(op->deviation + node * op->images + image, many);
  } else {
    norm.mean = (vec){0} + op->mean[node];
    norm.deviation = (vec){0} + op->deviation[node];
  }
  norm.factor = norm.deviation * (op->scale ? op->scale[node] : 1.0f);
  norm.added = (op->shift ? op->shift[node] : 0.0f) - norm.mean * norm.factor;
  return norm;
}

/* A row of maps as vectors, with a zero on either side. */
INLINE FAST void WIDTH(activated_row)(const nodes *op, const float *x, int64_t row, norm_of norm, vec *into, const int many) {
  const float *from = x + row * op->width * op->images;
  for (int64_t i = 0; i < op->width; i++) into[i + 1] = rectified(read(from + i * op->images, many) * norm.factor + norm.added);
}

INLINE FAST void WIDTH(forward_images)(const nodes *op, const float *x, float *z, int64_t node, int64_t image, vec *rows,
                                       const int many) {
  int64_t padded = op->width + 2, stride = op->stride, made = 0;
  const float *k = op->filter + 9 * node;
  norm_of norm = WIDTH(norm_at)(op, node, image, many);
  vec *zeros = rows + 3 * padded;
  memset(rows, 0, sizeof(vec) * 4 * (size_t)padded);
  x += image, z += image;
  for (int64_t y = 0; y < op->out_height; y++) {
    const vec *r[3];
    for (; made < op->height && made <= stride * y + 1; made++)
      WIDTH(activated_row)(op, x, made, norm, rows + made % 3 * padded, many);
    for (int i = 0; i < 3; i++) {
      int64_t row = stride * y + i - 1;
      r[i] = row < 0 || row >= op->height ? zeros : rows + row % 3 * padded;
    }
    float *out = z + y * op->out_width * op->images;
    vec a0 = r[0][0], a1 = r[1][0], a2 = r[2][0], b0 = r[0][1], b1 = r[1][1], b2 = r[2][1];
    for (int64_t i = 0; i < op->out_width; i++) {
      int64_t at = stride * i + 2;
      vec c0 = r[0][at], c1 = r[1][at], c2 = r[2][at];
      vec sum = k[0] * a0 + k[3] * a1 + k[6] * a2;
      sum += k[1] * b0 + k[4] * b1 + k[7] * b2;
      sum += k[2] * c0 + k[5] * c1 + k[8] * c2;
      write(out + i * op->images, sum, many);
      if (stride == 1) {
        a0 = b0, a1 = b1, a2 = b2, b0 = c0, b1 = c1, b2 = c2;
      } else {
        a0 = c0, a1 = c1, a2 = c2;
        if (i + 1 < op->out_width) b0 = r[0][at + 1], b1 = r[1][at + 1], b2 = r[2][at + 1];
      }
    }
  }
}

FAST static void WIDTH(nodes_forward)(const nodes *op, const float *x, float *z, int64_t first, int64_t last, float *scratch) {
  int64_t in = op->height * op->width * op->images, out = op->out_height * op->out_width * op->images;
  for (int64_t node = first; node < last; node++) {
    const float *from = x + node * in;
    if (op->norm == BATCH_STATISTICS) {
      float mean = (float)(WIDTH(moment)(from, in, 0.0f, 1) / (double)in);
      op->mean[node] = mean;
      op->deviation[node] = (float)(1.0 / sqrt(WIDTH(moment)(from, in, mean, 2) / (double)in + op->eps));
    }
    int64_t image = 0;
    for (; image + LANES <= op->images; image += LANES) {
      if (op->norm == INSTANCE_STATISTICS) WIDTH(measure)(op, from, node, image, LANES);
      WIDTH(forward_images)(op, from, z + node * out, node, image, (vec *)scratch, LANES);
    }
    int many = (int)(op->images - image);
    if (many) {
      if (op->norm == INSTANCE_STATISTICS) WIDTH(measure)(op, from, node, image, many);
      WIDTH(forward_images)(op, from, z + node * out, node, image, (vec *)scratch, many);
    }
  }
}

/* A row of gradients as vectors, with a zero on either side; zeros where there is no such row. */
INLINE FAST void WIDTH(gradient_row)(const nodes *op, const float *grad, int64_t row, vec *into, const int many) {
  const float *from = grad + row * op->out_width * op->images;
  for (int64_t i = 0; i < op->out_width; i++) into[i + 1] = row < op->out_height ? read(from + i * op->images, many) : (vec){0};
}

/* What one node sums over the batch: the gradients before the norm, those times x - mean, and those of the filter. */
typedef struct {
  double plain, centred, filter[9];
} WIDTH(sums);
#define sums_of WIDTH(sums)

INLINE FAST void WIDTH(backward_images)(const nodes *op, const float *x, const float *grad, float *into, int64_t node,
                                        int64_t image, vec *rows, sums_of *sums, const int many) {
  int64_t width = op->width, padded = width + 2, images = op->images, stride = op->stride, made = 0;
  const float *k = op->filter + 9 * node;
  norm_of norm = WIDTH(norm_at)(op, node, image, many);
  vec *zeros = rows + 3 * padded, plain = {0}, centred = {0}, filter[9];
  memset(rows, 0, sizeof(vec) * 4 * (size_t)padded);
  for (int i = 0; i < 9; i++) filter[i] = (vec){0};
  x += image, grad += image, into += image;
  for (int64_t row = 0; row < op->height; row++) {
    const float *from = x + row * width * images;
    float *to = into + row * width * images;
    vec here = {0}, here_centred = {0}, f[9];
    for (int i = 0; i < 9; i++) f[i] = (vec){0};
    for (; made < op->out_height && stride * made <= row + 1; made++)
      WIDTH(gradient_row)(op, grad, made, rows + made % 3 * padded, many);
    const vec *g[3]; /* the row of gradients that each row of the filter has to do with */
    for (int i = 0; i < 3; i++) {
      int64_t twice = row + 1 - i, out = twice / stride;
      g[i] = twice < 0 || twice % stride || out >= op->out_height ? zeros : rows + out % 3 * padded;
    }
    if (stride == 1) {
      vec a0 = g[0][0], a1 = g[1][0], a2 = g[2][0], b0 = g[0][1], b1 = g[1][1], b2 = g[2][1];
      for (int64_t i = 0; i < width; i++) {
        vec c0 = g[0][i + 2], c1 = g[1][i + 2], c2 = g[2][i + 2];
        vec value = read(from + i * images, many), before = value * norm.factor + norm.added, y = rectified(before);
        vec back = k[2] * a0 + k[5] * a1 + k[8] * a2;
        back += k[1] * b0 + k[4] * b1 + k[7] * b2;
        back += k[0] * c0 + k[3] * c1 + k[6] * c2;
        f[2] += y * a0, f[5] += y * a1, f[8] += y * a2;
        f[1] += y * b0, f[4] += y * b1, f[7] += y * b2;
        f[0] += y * c0, f[3] += y * c1, f[6] += y * c2;
        back = (vec)((bits)back & ~(before <= (vec){0}));
        here += back, here_centred += back * (value - norm.mean);
        write(to + i * images, back, many);
        a0 = b0, a1 = b1, a2 = b2, b0 = c0, b1 = c1, b2 = c2;
      }
    } else {
      for (int64_t i = 0; i < width; i++) {
        vec value = read(from + i * images, many), before = value * norm.factor + norm.added, y = rectified(before);
        vec back = {0};
        if (i % 2 == 0) {
          int64_t at = i / 2 + 1;
          back += k[1] * g[0][at] + k[4] * g[1][at] + k[7] * g[2][at];
          f[1] += y * g[0][at], f[4] += y * g[1][at], f[7] += y * g[2][at];
        } else {
          int64_t at = i / 2 + 1;
          back += k[0] * g[0][at + 1] + k[3] * g[1][at + 1] + k[6] * g[2][at + 1];
          back += k[2] * g[0][at] + k[5] * g[1][at] + k[8] * g[2][at];
          f[0] += y * g[0][at + 1], f[3] += y * g[1][at + 1], f[6] += y * g[2][at + 1];
          f[2] += y * g[0][at], f[5] += y * g[1][at], f[8] += y * g[2][at];
        }
        back = (vec)((bits)back & ~(before <= (vec){0}));
        here += back, here_centred += back * (value - norm.mean);
        write(to + i * images, back, many);
      }
    }
    plain += here, centred += here_centred;
    for (int i = 0; i < 9; i++) filter[i] += f[i];
  }
  if (op->norm == INSTANCE_STATISTICS) {
    float share = 1.0f / (float)(op->height * width);
    vec mean = plain * share, slope = centred * norm.deviation * norm.deviation * share;
    for (int64_t p = 0; p < op->height * width; p++) {
      vec value = read(into + p * images, many) - mean - (read(x + p * images, many) - norm.mean) * slope;
      write(into + p * images, value * norm.factor, many);
    }
    centred *= norm.deviation;
  }
  sums->plain += total(plain, many), sums->centred += total(centred, many);
  for (int i = 0; i < 9; i++) sums->filter[i] += total(filter[i], many);
}

FAST static void WIDTH(nodes_backward)(const nodes *op, const float *x, const float *grad, float *into_x, float *into_filter,
                                       float *into_scale, float *into_shift, int64_t first, int64_t last, float *scratch) {
  int64_t in = op->height * op->width * op->images, out = op->out_height * op->out_width * op->images;
  for (int64_t node = first; node < last; node++) {
    const float *from = x + node * in, *back = grad + node * out;
    float *into = into_x + node * in;
    sums_of sums = {0};
    int64_t image = 0;
    for (; image + LANES <= op->images; image += LANES)
      WIDTH(backward_images)(op, from, back, into, node, image, (vec *)scratch, &sums, LANES);
    int many = (int)(op->images - image);
    if (many) WIDTH(backward_images)(op, from, back, into, node, image, (vec *)scratch, &sums, many);
    float deviation = op->norm == GIVEN_STATISTICS || op->norm == BATCH_STATISTICS ? op->deviation[node] : 1.0f;
    for (int i = 0; i < 9; i++) into_filter[9 * node + i] = (float)sums.filter[i];
    into_scale[node] = (float)(sums.centred * deviation);
    into_shift[node] = (float)sums.plain;
    float factor = deviation * (op->scale ? op->scale[node] : 1.0f);
    if (op->norm == GIVEN_STATISTICS)
      for (int64_t i = 0; i < in; i++) into[i] *= factor;
    if (op->norm == BATCH_STATISTICS) {
      float mean = op->mean[node], less = (float)(sums.plain / (double)in);
      float slope = (float)(sums.centred / (double)in * deviation * deviation);
      for (int64_t i = 0; i < in; i++) into[i] = factor * (into[i] - less - (from[i] - mean) * slope);
    }
  }
}

/* Some columns of all rows: so many times TILE vectors, or a part of one. */
INLINE FAST void WIDTH(edges_tile)(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows,
                                   const float *in, int64_t apart, float *out, int64_t n, int64_t times, const int vectors,
                                   const int many) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t at = 0; at < times * vectors * LANES; at += vectors * LANES) {
      vec sum[TILE];
#pragma GCC unroll 8
      for (int k = 0; k < vectors; k++) sum[k] = (vec){0};
      for (int64_t e = starts[row]; e < starts[row + 1]; e++) {
        const float *source = in + columns[e] * apart + at, value = values[e];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; k++) sum[k] += value * read(source + k * LANES, many);
      }
#pragma GCC unroll 8
      for (int k = 0; k < vectors; k++) write(out + row * n + at + k * LANES, sum[k], many);
    }
}

/* Some columns of the rows from `first` on of a matrix [rows, n], end to end. What lies far apart takes longer to find than to
 * read. */
INLINE FAST const float *WIDTH(gathered)(const float *in, int64_t first, int64_t rows, int64_t n, float *scratch) {
  for (int64_t row = first; row < rows; row++)
#pragma GCC unroll 8
    for (int k = 0; k < COLUMNS; k += LANES) write(scratch + row * COLUMNS + k, read(in + row * n + k, LANES), LANES);
  return scratch;
}

FAST static void WIDTH(edges)(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows, int64_t least,
                              int64_t width, const float *in, float *out, int64_t n, int64_t first, int64_t last,
                              float *scratch) {
  int64_t at = first;
  if (scratch)
    for (; at + COLUMNS <= last; at += COLUMNS) {
      const float *near = WIDTH(gathered)(in + at, least, width, n, scratch);
      WIDTH(edges_tile)(starts, columns, values, rows, near, COLUMNS, out + at, n, COLUMNS / (TILE * LANES), TILE, LANES);
    }
  for (int64_t tiles; (tiles = (last - at) / (TILE * LANES)); at += tiles * TILE * LANES) {
    int64_t most = columns_at_a_time(rows + width) / (TILE * LANES);
    tiles = tiles < most ? tiles : most;
    WIDTH(edges_tile)(starts, columns, values, rows, in + at, n, out + at, n, tiles, TILE, LANES);
  }
  for (; at + LANES <= last; at += LANES)
    WIDTH(edges_tile)(starts, columns, values, rows, in + at, n, out + at, n, 1, 1, LANES);
  if (at < last) WIDTH(edges_tile)(starts, columns, values, rows, in + at, n, out + at, n, 1, 1, (int)(last - at));
}

/* Sums of neighbours: those of one vector and then those of another. */
INLINE FAST vec WIDTH(paired)(vec one, vec other) { return SHUFFLE(one, other, EVEN) + SHUFFLE(one, other, ODD); }

/* The sums of LANES vectors, one in each entry. */
INLINE FAST vec WIDTH(totals)(vec *values) {
#pragma GCC unroll 4
  for (int many = LANES / 2; many; many /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < many; i++) values[i] = WIDTH(paired)(values[2 * i], values[2 * i + 1]);
  return values[0];
}

/* Some columns of all rows of out, as above, and what they add to the gradients of the entries: each of in is read once. */
INLINE FAST void WIDTH(edges_back_tile)(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows,
                                        const float *in, int64_t apart, const float *states, float *out, int64_t n,
                                        float *gradients, int64_t times, const int vectors, const int many) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t at = 0; at < times * vectors * LANES; at += vectors * LANES) {
      vec sum[TILE], state[TILE];
#pragma GCC unroll 8
      for (int k = 0; k < vectors; k++) sum[k] = (vec){0}, state[k] = read(states + row * n + at + k * LANES, many);
      for (int64_t e = starts[row]; e < starts[row + 1]; e += LANES) {
        int wide = starts[row + 1] - e < LANES ? (int)(starts[row + 1] - e) : LANES;
        vec products[LANES] = {{0}};
        for (int i = 0; i < wide; i++) {
          const float *target = in + columns[e + i] * apart + at, value = values[e + i];
          vec product[2] = {{0}, {0}};
#pragma GCC unroll 8
          for (int k = 0; k < vectors; k++) {
            vec grad = read(target + k * LANES, many);
            sum[k] += value * grad;
            product[k % 2] += state[k] * grad;
          }
          products[i] = product[0] + product[1];
        }
        vec found = WIDTH(totals)(products);
        write(gradients + e - starts[0], read(gradients + e - starts[0], wide) + found, wide);
      }
#pragma GCC unroll 8
      for (int k = 0; k < vectors; k++) write(out + row * n + at + k * LANES, sum[k], many);
    }
}

FAST static void WIDTH(edges_back)(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows,
                                   int64_t least, int64_t width, const float *in, const float *states, float *out,
                                   float *gradients, int64_t n, int64_t first, int64_t last, float *scratch) {
  int64_t at = first, whole = TILE * LANES;
#define TAKE(near, apart, times, vectors, many) \
  WIDTH(edges_back_tile)(starts, columns, values, rows, near, apart, states + at, out + at, n, gradients, times, vectors, many)
  if (scratch)
    for (; at + COLUMNS <= last; at += COLUMNS)
      TAKE(WIDTH(gathered)(in + at, least, width, n, scratch), COLUMNS, COLUMNS / whole, TILE, LANES);
  for (int64_t tiles, most = columns_at_a_time(2 * rows + width) / whole; (tiles = (last - at) / whole); at += tiles * whole) {
    tiles = tiles < most ? tiles : most;
    TAKE(in + at, n, tiles, TILE, LANES);
  }
  for (; at + LANES <= last; at += LANES) TAKE(in + at, n, 1, 1, LANES);
  if (at < last) TAKE(in + at, n, 1, 1, (int)(last - at));
#undef TAKE
}

/* Rounded to the nearest bfloat16, to the even one of two. */
INLINE FAST void WIDTH(write_bfloat16)(uint16_t *at, vec value, const int many) {
  bits whole = (bits)value, rounded = (whole + 0x7fff + (whole >> 16 & 1)) >> 16, no_number = value != value;
  rounded = (no_number & 0x7fc0) | (~no_number & rounded);
  for (int i = 0; i < many; i++) at[i] = (uint16_t)rounded[i];
}

INLINE FAST void WIDTH(pooled_square)(const float *in, int64_t right, int64_t below, void *out, int64_t at, float whole,
                                      const int bfloat16, const int many) {
  vec sum = read(in, many);
  if (right) sum += read(in + right, many);
  if (below) sum += read(in + below, many);
  if (right && below) sum += read(in + right + below, many);
  sum *= whole;
  if (bfloat16)
    WIDTH(write_bfloat16)((uint16_t *)out + at, sum, many);
  else
    write((float *)out + at, sum, many);
}

FAST static void WIDTH(pooled)(const float *in, void *out, int64_t height, int64_t width, int64_t images, int32_t mean,
                               int32_t bfloat16, int64_t first, int64_t last) {
  int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
  for (int64_t map = first; map < last; map++)
    for (int64_t y = 0; y < rows; y++)
      for (int64_t x = 0; x < columns; x++) {
        const float *from = in + ((map * height + 2 * y) * width + 2 * x) * images;
        int64_t at = ((map * rows + y) * columns + x) * images, i = 0;
        int64_t right = 2 * x + 1 < width ? images : 0, below = 2 * y + 1 < height ? width * images : 0;
        float whole = mean ? 1.0f / (float)((right ? 2 : 1) * (below ? 2 : 1)) : 1.0f;
        if (bfloat16)
          for (; i + LANES <= images; i += LANES) WIDTH(pooled_square)(from + i, right, below, out, at + i, whole, 1, LANES);
        else
          for (; i + LANES <= images; i += LANES) WIDTH(pooled_square)(from + i, right, below, out, at + i, whole, 0, LANES);
        if (i < images) WIDTH(pooled_square)(from + i, right, below, out, at + i, whole, bfloat16, (int)(images - i));
      }
}

#undef read
#undef write
#undef total
#undef norm_of
#undef sums_of
#undef TILE
