/* The kernels of layers that are no graphs, for vectors of LANES floats; _kernels_vector.h includes this. */

#define SPARSE_TILE 14

/* out[t] = base[t] + second[t] + sum of weight * in[offset] over the edges of t, n vectors of pixels in registers. Edges come
 * in blocks of sources that stay in the nearest cache while all targets read them; between blocks sums wait in their maps. */
INLINE FAST void WIDTH(sparse_tile)(const struct task *task, const float *in, const float *second, float *out, int64_t pixel,
                                    const int32_t *mask, int32_t low, int32_t high, const int n) {
  int simple = task->activation <= ACTIVATION(relu);
  for (int32_t block = 0; block < task->blocks; block++) {
    const int32_t *starts = task->starts + (int64_t)block * (task->targets + 1);
    int last = block == task->blocks - 1;
    for (int32_t t = low; t < high; t++) {
      int32_t e = starts[t], stop = starts[t + 1];
      if (e == stop && block && !last) continue;
      vec sum[SPARSE_TILE];
      float *target = out + (int64_t)t * task->out_plane;
      if (block) {
#pragma GCC unroll 16
        for (int k = 0; k < n; k++) sum[k] = read(target + k * LANES);
      } else {
        float base = task->shift ? task->shift[t] : 0.0f;
        const float *added = added_map(task, t);
#pragma GCC unroll 16
        for (int k = 0; k < n; k++) sum[k] = base + (vec){0};
        if (added) {
#pragma GCC unroll 16
          for (int k = 0; k < n; k++) sum[k] += read(added + pixel + k * LANES);
        }
        if (second) {
          const float *other = second + (int64_t)t * task->second_plane;
#pragma GCC unroll 16
          for (int k = 0; k < n; k++) sum[k] += read(other + k * LANES);
        }
      }
      for (; e < stop; e++) {
        const float *source = in + task->offsets[e], weight = task->weight[e];
#pragma GCC unroll 16
        for (int k = 0; k < n; k++) sum[k] += weight * read(source + k * LANES);
      }
      if (last && simple) {
        if (task->activation) {
#pragma GCC unroll 16
          for (int k = 0; k < n; k++) sum[k] = rectified(sum[k]);
        }
        if (mask) {
#pragma GCC unroll 16
          for (int k = 0; k < n; k++) sum[k] = masked(sum[k], mask + k * LANES);
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) write(target + k * LANES, sum[k]);
      if (last && !simple) WIDTH(activate)(task, target, mask, n);
    }
  }
}

static OVER_READS FAST void WIDTH(sparse)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t low = begin(context, task->targets), high = end(context, task->targets);
  int64_t start = (int64_t)call->first * task->pitch, floats = (int64_t)call->rows * task->pitch, done = 0;
  const float *in = context->arena + (call->in_offset + start);
  const float *second = task->second_sources ? context->arena + (call->second_offset + start) : 0;
  float *out = context->arena + (call->out_offset + start);
  if (task->out_plane == 1) {
    for (int32_t t = low; t < high; t++) {
      float sum = (task->shift ? task->shift[t] : 0.0f) + (second ? second[t] : 0.0f);
      const float *added = added_map(task, t);
      if (added) sum += *added;
      for (int32_t e = task->starts[t]; e < task->starts[t + 1]; e++) sum += task->weight[e] * in[task->offsets[e]];
      out[t] = WIDTH(activated_number)(task, sum);
    }
    return;
  }
  int64_t most = (int64_t)task->tile * 16 / LANES, vectors = (floats + LANES - 1) / LANES;
  most = most < 1 || most > SPARSE_TILE ? SPARSE_TILE : most;
  int64_t tiles = (vectors + most - 1) / most;
  for (int64_t tile = 0; tile < tiles; tile++) {
    int n = (int)((vectors - done + tiles - tile - 1) / (tiles - tile));
    int64_t at = done * LANES;
    const float *other = second ? second + at : 0;
    const int32_t *mask = task->mask ? task->mask + (start + at) : 0;
#define CASE(n) \
  case n: WIDTH(sparse_tile)(task, in + at, other, out + at, start + at, mask, low, high, n); break;
    switch (n) {
      CASE(1)
      CASE(2)
      CASE(3)
      CASE(4)
      CASE(5)
      CASE(6)
      CASE(7)
      CASE(8)
      CASE(9)
      CASE(10)
      CASE(11)
      CASE(12)
      CASE(13)
      CASE(14)
    }
#undef CASE
    done += n;
  }
}

/* The same where nearly all weights are there: four targets share what they load. Weights lie [group][tap][4]. */
INLINE FAST void WIDTH(dense_tile)(const struct task *task, const float *in, const float *second, float *out, int64_t pixel,
                                   const int32_t *mask, int32_t low, int32_t high, const int n) {
  int simple = task->activation <= ACTIVATION(relu);
  for (int32_t group = low; group < high; group++) {
    vec sum[4][GROUP_TILE];
    const float *weight = task->weight + (int64_t)group * 4 * task->taps;
    int32_t count = task->targets - 4 * group < 4 ? task->targets - 4 * group : 4;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) sum[i][k] = (vec){0};
    }
    for (int32_t tap = 0; tap < task->taps; tap++, weight += 4) {
      const float *source = in + task->offsets[tap];
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
      float *target = out + (int64_t)t * task->out_plane, base = task->shift ? task->shift[t] : 0.0f;
      const float *added = added_map(task, t);
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) {
        vec value = sum[i][k] + base;
        if (added) value += read(added + pixel + k * LANES);
        if (second) value += read(second + (int64_t)t * task->second_plane + k * LANES);
        if (simple) {
          if (task->activation) value = rectified(value);
          if (mask) value = masked(value, mask + k * LANES);
        }
        write(target + k * LANES, value);
      }
      if (!simple) WIDTH(activate)(task, target, mask, n);
    }
  }
}

static OVER_READS FAST void WIDTH(dense)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t groups = (task->targets + 3) / 4, low = begin(context, groups), high = end(context, groups);
  int64_t start = (int64_t)call->first * task->pitch, floats = (int64_t)call->rows * task->pitch, done = 0;
  const float *in = context->arena + (call->in_offset + start);
  const float *second = task->second_sources ? context->arena + (call->second_offset + start) : 0;
  float *out = context->arena + (call->out_offset + start);
  int64_t vectors = (floats + LANES - 1) / LANES, tiles = (vectors + GROUP_TILE - 1) / GROUP_TILE;
  for (int64_t tile = 0; tile < tiles; tile++) {
    int n = (int)((vectors - done + tiles - tile - 1) / (tiles - tile));
    int64_t at = done * LANES;
    const float *other = second ? second + at : 0;
#define CASE(n) \
  case n: \
    WIDTH(dense_tile)(task, in + at, other, out + at, start + at, task->mask ? task->mask + (start + at) : 0, low, high, n); \
    break;
    switch (n) {
      CASE(1)
      CASE(2)
      CASE(3)
#if GROUP_TILE > 3
      CASE(4)
      CASE(5)
      CASE(6)
#endif
    }
#undef CASE
    done += n;
  }
}

/* Copies of maps with their padding, every stride_y-th row and stride_x-th column from a phase on; starts and middles hold the
 * rows and columns of the phases. A strided convolution reads them as one without stride. */
static FAST void WIDTH(phases)(const struct task *task, const struct call *call, const struct context *context) {
  const float *in = (task->outside ? context->images : context->arena) + call->in_offset;
  float *out = context->arena + call->out_offset;
  int32_t stride = task->stride_x;
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++) {
    const float *map = in + (int64_t)(t / task->blocks) * task->plane;
    int32_t from = task->middles[t % task->blocks] - task->pad_x, low = 0, high = task->out_width;
    while (low < high && low * stride + from < 0) low++;
    while (high > low && (high - 1) * stride + from >= task->width) high--;
    for (int32_t y = call->first; y < call->first + call->rows; y++) {
      int32_t row = y * task->stride_y + task->starts[t % task->blocks] - task->pad_y;
      float *line = out + ((int64_t)t * task->out_plane + (int64_t)y * task->out_pitch);
      if (row < 0 || row >= task->height) {
        blank(line, 0, task->out_pitch);
        continue;
      }
      const float *source = map + (int64_t)row * task->pitch;
      blank(line, 0, low);
      int32_t x = low;
      if (stride == 1) {
        memcpy(line + low, source + low + from, sizeof(float) * (size_t)(high - low));
        x = high;
      } else if (stride == 2)
        for (; x + LANES <= high && 2 * x + from + 2 * LANES <= task->width; x += LANES)
          write(line + x, SHUFFLE(read(source + 2 * x + from), read(source + 2 * x + from + LANES), EVEN));
      for (; x < high; x++) line[x] = source[(int64_t)x * stride + from];
      blank(line, high, task->out_pitch);
    }
  }
}

/* What a function of two vectors makes of two maps, or of a map and a number or a constant; rows of maps are one line. */
#define JOINED(name, operator, neutral) \
  static OVER_READS FAST void WIDTH(name)(const struct task *task, const struct call *call, const struct context *context) { \
    int64_t start = (int64_t)call->first * task->pitch, floats = (int64_t)call->rows * task->pitch; \
    const int32_t *mask = task->mask ? task->mask + start : 0; \
    for (int32_t c = begin(context, task->targets), stop = end(context, task->targets); c < stop; c++) { \
      const float *in = context->arena + (call->in_offset + start + (int64_t)c * task->plane), *second = 0; \
      float *out = context->arena + (call->out_offset + start + (int64_t)c * task->out_plane), number = neutral; \
      if (task->second_sources) second = context->arena + (call->second_offset + (int64_t)c * task->second_plane); \
      if (second && task->second_plane == 1) number = *second, second = 0; \
      if (second) second += start; \
      if (task->added) second = task->added + (start + (int64_t)c * task->added_plane); \
      if (task->out_plane == 1) { \
        *out = WIDTH(activated_number)(task, *in operator(second ? *second : number)); \
        continue; \
      } \
      for (int64_t x = 0; x < floats; x += LANES) { \
        vec other = number + (vec){0}; \
        if (second) other = read(second + x); \
        write(out + x, read(in + x) operator other); \
      } \
      if (task->activation || mask) WIDTH(activate)(task, out, mask, (floats + LANES - 1) / LANES); \
    } \
  }
JOINED(sum, +, 0.0f)
JOINED(product, *, 1.0f)
#undef JOINED

/* The largest value or the mean of windows. In scratch lies what the rows of a window come to, with its padding. */
static FAST void WIDTH(pool)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t height = task->height, width = task->width, stride = task->stride_x, pad = task->pad_x, largest = task->largest;
  int32_t whole = (task->out_width + LANES) * stride + task->kernel_width * task->dilation_x + 2 * LANES;
  float *line = context->scratch, *inner = line + pad;
  for (int32_t x = 0; x < whole; x++) line[x] = largest ? -INFINITY : 0.0f;
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++) {
    const float *in = context->arena + (call->in_offset + (int64_t)t * task->plane);
    for (int32_t y = call->first; y < call->first + call->rows; y++) {
      float *out = context->arena + (call->out_offset + (int64_t)t * task->out_plane + (int64_t)y * task->out_pitch);
      int32_t top = y * task->stride_y - task->pad_y, rows = 0, bottom = top + task->kernel_height;
      for (int32_t ky = 0; ky < task->kernel_height; ky++) {
        int32_t row = top + ky * task->dilation_y, x = 0;
        if (row < 0 || row >= height) continue;
        const float *source = in + (int64_t)row * task->pitch;
        if (!rows++) {
          memcpy(inner, source, sizeof(float) * (size_t)width);
          continue;
        }
        for (; x + LANES <= width; x += LANES) {
          vec one = read(inner + x), other = read(source + x), both = one + other;
          if (largest) both = chosen((other > one) | (other != other), other, one);
          write(inner + x, both);
        }
        for (; x < width; x++)
          if (!largest)
            inner[x] += source[x];
          else if (source[x] > inner[x] || source[x] != source[x])
            inner[x] = source[x];
      }
      int32_t x = 0;
      for (; stride <= 2 && x + LANES <= task->out_pitch && x < task->out_width; x += LANES) {
        vec found = {0};
        for (int32_t kx = 0; kx < task->kernel_width; kx++) {
          const float *at = line + x * stride + kx * task->dilation_x;
          vec value = read(at);
          if (stride == 2) value = SHUFFLE(value, read(at + LANES), EVEN);
          if (!kx)
            found = value;
          else if (largest)
            found = chosen((value > found) | (value != value), value, found);
          else
            found += value;
        }
        write(out + x, found);
      }
      for (; x < task->out_width; x++) {
        const float *at = line + x * stride;
        float found = *at;
        for (int32_t kx = 1; kx < task->kernel_width; kx++) {
          float value = at[kx * task->dilation_x];
          found = !largest ? found + value : value > found || value != value ? value : found;
        }
        out[x] = found;
      }
      if (bottom > height + task->pad_y) bottom = height + task->pad_y;
      for (x = 0; !largest && x < task->out_width; x++) {
        int32_t left = x * stride - pad, right = left + task->kernel_width, from = left > 0 ? left : 0;
        if (right > width + pad) right = width + pad;
        int32_t inside = (right < width ? right : width) - from;
        out[x] /= (float)(task->padded ? (bottom - top) * (right - left) : rows * inside);
      }
      blank(out, task->out_width, task->out_pitch);
    }
  }
}

/* Means of as many windows as there are rows and columns of targets. */
static FAST void WIDTH(adaptive_mean)(const struct task *task, const struct call *call, const struct context *context) {
  int64_t rows = task->out_height, columns = task->out_width;
  for (int32_t t = begin(context, task->targets), stop = end(context, task->targets); t < stop; t++) {
    const float *in = context->arena + (call->in_offset + (int64_t)t * task->plane);
    for (int32_t y = 0; y < rows; y++) {
      float *out = context->arena + (call->out_offset + (int64_t)t * task->out_plane + (int64_t)y * task->out_pitch);
      int32_t top = (int32_t)(y * (int64_t)task->height / rows);
      int32_t bottom = (int32_t)(((y + 1) * (int64_t)task->height + rows - 1) / rows);
      for (int32_t x = 0; x < columns; x++) {
        int32_t left = (int32_t)(x * (int64_t)task->width / columns);
        int32_t right = (int32_t)(((x + 1) * (int64_t)task->width + columns - 1) / columns);
        float sum = 0.0f;
        for (int32_t row = top; row < bottom; row++)
          for (int32_t column = left; column < right; column++) sum += in[(int64_t)row * task->pitch + column];
        out[x] = sum / (float)((bottom - top) * (right - left));
      }
      blank(out, task->out_width, task->out_pitch);
    }
  }
}

/* Number by number, from offsets to middles; first all becomes 0 where that is asked for. The first thread does it alone. */
static FAST void WIDTH(rearrange)(const struct task *task, const struct call *call, const struct context *context) {
  if (context->thread) return;
  const float *in = context->arena + call->in_offset;
  float *out = context->arena + call->out_offset;
  for (int32_t t = 0; task->clear && t < task->targets; t++)
    memset(out + (int64_t)t * task->out_plane, 0, sizeof(float) * (size_t)task->out_height * (size_t)task->out_pitch);
  for (int32_t i = 0; i < task->taps; i++) out[task->middles[i]] = in[task->offsets[i]];
}

/* Normalisation over the channels of each group, at each place. */
static FAST void WIDTH(layer_norm)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t size = task->targets / task->groups;
  if (task->plane == 1) {
    for (int32_t g = begin(context, task->groups), stop = end(context, task->groups); g < stop; g++) {
      const float *in = context->arena + (call->in_offset + (int64_t)g * size);
      float *out = context->arena + (call->out_offset + (int64_t)g * size);
      double sum = 0, squares = 0;
      for (int32_t c = 0; c < size; c++) sum += in[c];
      double mean = sum / size;
      for (int32_t c = 0; c < size; c++) squares += (in[c] - mean) * (in[c] - mean);
      float scale = (float)(1 / sqrt(squares / size + task->eps));
      for (int32_t c = 0; c < size; c++)
        out[c] = (float)(in[c] - mean) * scale * task->scale[g * size + c] + task->shift[g * size + c];
    }
    return;
  }
  int32_t vectors = (task->height * task->pitch + LANES - 1) / LANES;
  for (int32_t v = begin(context, vectors), stop = end(context, vectors); v < stop; v++)
    for (int32_t g = 0; g < task->groups; g++) {
      const float *in = context->arena + (call->in_offset + (int64_t)g * size * task->plane + (int64_t)v * LANES);
      float *out = context->arena + (call->out_offset + (int64_t)g * size * task->out_plane + (int64_t)v * LANES);
      vec sum = {0}, squares = {0}, scale = {0};
      for (int32_t c = 0; c < size; c++) sum += read(in + (int64_t)c * task->plane);
      vec mean = sum / (float)size;
      for (int32_t c = 0; c < size; c++) {
        vec apart = read(in + (int64_t)c * task->plane) - mean;
        squares += apart * apart;
      }
      squares = squares / (float)size + task->eps;
      for (int32_t i = 0; i < LANES; i++) scale[i] = 1.0f / sqrtf(squares[i]);
      for (int32_t c = 0; c < size; c++) {
        int32_t channel = g * size + c;
        vec value = (read(in + (int64_t)c * task->plane) - mean) * scale * task->scale[channel] + task->shift[channel];
        write(out + (int64_t)c * task->out_plane, task->mask ? masked(value, task->mask + v * LANES) : value);
      }
    }
}

/* Normalisation over the channels of each group and all places. */
static FAST void WIDTH(group_norm)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t size = task->targets / task->groups;
  double count = (double)size * task->height * task->width;
  for (int32_t g = begin(context, task->groups), stop = end(context, task->groups); g < stop; g++) {
    double sum = 0, squares = 0;
    float mean = 0;
    for (int pass = 0; pass < 2; pass++) {
      for (int32_t c = g * size; c < (g + 1) * size; c++)
        for (int32_t y = 0; y < task->height; y++) {
          const float *row = context->arena + (call->in_offset + (int64_t)c * task->plane + (int64_t)y * task->pitch);
          float part = 0;
          if (pass == 0) {
            for (int32_t x = 0; x < task->width; x++) part += row[x];
            sum += part;
          } else {
            for (int32_t x = 0; x < task->width; x++) part += (row[x] - mean) * (row[x] - mean);
            squares += part;
          }
        }
      mean = (float)(sum / count);
    }
    double scale = 1 / sqrt(squares / count + task->eps);
    for (int32_t c = g * size; c < (g + 1) * size; c++) {
      float factor = (float)(task->scale[c] * scale), shift = task->shift[c] - mean * factor;
      for (int32_t y = 0; y < task->height; y++) {
        const float *row = context->arena + (call->in_offset + (int64_t)c * task->plane + (int64_t)y * task->pitch);
        float *out = context->arena + (call->out_offset + (int64_t)c * task->out_plane + (int64_t)y * task->out_pitch);
        for (int32_t x = 0; x < task->width; x++) out[x] = row[x] * factor + shift;
        blank(out, task->width, task->out_pitch);
      }
    }
  }
}

INLINE FAST float WIDTH(total)(vec value) {
  float sum = 0;
  for (int32_t i = 0; i < LANES; i++) sum += value[i];
  return sum;
}

/* Softmax attention of queries, keys and values, in heads of neighbouring channels; scores of a query lie in scratch. */
static OVER_READS FAST void WIDTH(attention)(const struct task *task, const struct call *call, const struct context *context) {
  int32_t queries = task->out_width, keys = task->width;
  int32_t depth = task->sources / task->groups, wide = task->targets / task->groups;
  int32_t vectors = (keys + LANES - 1) / LANES;
  float *scores = context->scratch;
  for (int32_t i = begin(context, task->groups * queries), stop = end(context, task->groups * queries); i < stop; i++) {
    int32_t head = i / queries, query = i % queries;
    const float *q = context->arena + (call->in_offset + (int64_t)head * depth * task->plane + query);
    const float *k = context->arena + (call->second_offset + (int64_t)head * depth * task->second_plane);
    const float *v = context->arena + (call->third_offset + (int64_t)head * wide * task->third_plane);
    float *out = context->arena + (call->out_offset + (int64_t)head * wide * task->out_plane + query);
    for (int32_t at = 0; at < vectors; at += 4) {
      int32_t n = vectors - at < 4 ? vectors - at : 4;
      vec sum[4] = {{0}, {0}, {0}, {0}};
      for (int32_t d = 0; d < depth; d++) {
        float factor = q[(int64_t)d * task->plane];
        const float *key = k + (int64_t)d * task->second_plane + at * LANES;
        for (int32_t j = 0; j < n; j++) sum[j] += factor * read(key + j * LANES);
      }
      for (int32_t j = 0; j < n; j++) {
        sum[j] *= task->reciprocal;
        if (task->added) sum[j] += read(task->added + (int64_t)query * task->added_plane + (at + j) * LANES);
        write(scores + (at + j) * LANES, sum[j]);
      }
    }
    float most = scores[0], total = 0.0f;
    for (int32_t j = 1; j < keys; j++)
      if (scores[j] > most || scores[j] != scores[j]) most = scores[j];
    for (int32_t j = keys; j < vectors * LANES; j++) scores[j] = -INFINITY;
    for (int32_t at = 0; at < vectors; at++) {
      vec score = most == -INFINITY ? (vec){0} : exponential(read(scores + at * LANES) - most);
      for (int32_t j = 0; j < LANES; j++)
        if (at * LANES + j >= keys) score[j] = 0.0f;
      write(scores + at * LANES, score);
      total += WIDTH(total)(score);
    }
    for (int32_t d = 0; d < wide; d++) {
      const float *value = v + (int64_t)d * task->third_plane;
      float found = 0.0f;
      int32_t j = 0;
      vec sum = {0};
      for (; j + LANES <= keys; j += LANES) sum += read(scores + j) * read(value + j);
      found = WIDTH(total)(sum);
      for (; j < keys; j++) found += scores[j] * value[j];
      out[(int64_t)d * task->out_plane] = total == 0.0f ? 0.0f : found / total; /* 0 where no key is seen */
    }
  }
}

#undef SPARSE_TILE
