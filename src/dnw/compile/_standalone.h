/* Plain C99 for instructions; save_c puts what a network needs into its file, where index_t is declared. Maps lie one after the
 * other, row by row. Each function stands behind a line with its name, and before the next such line. */

/* FUNCTION edges */
/* Each target is its base plus the weighted sum of its sources. */
static void edges(const float *in, float *out, int targets, int pixels, const float *weight, const index_t *source,
                  const index_t *count, const float *base) {
  for (int t = 0; t < targets; t++, out += pixels) {
    for (int p = 0; p < pixels; p++) out[p] = base ? base[t] : 0.0f;
    for (int e = 0; e < (int)count[t]; e++, weight++, source++) {
      const float *map = in + (long)*source * pixels, w = *weight;
      for (int p = 0; p < pixels; p++) out[p] += w * map[p];
    }
  }
}

/* FUNCTION add_constants */
/* What constant nodes add to some maps: equal rows and columns are stored once. */
static void add_constants(float *out, int height, int width, int maps, const index_t *target_channels, const float *core,
                          int core_height, int core_width, const index_t *rows, const index_t *columns) {
  for (int m = 0; m < maps; m++)
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++)
        out[((long)target_channels[m] * height + y) * width + x] +=
            core[((long)m * core_height + rows[y]) * core_width + columns[x]];
}

/* FUNCTION convolution */
/* From all maps of a group to all maps of it. */
static void convolution(const float *in, float *out, int sources, int targets, int groups, int height, int width,
                        int out_height, int out_width, int kernel_height, int kernel_width, int stride_y, int stride_x,
                        int pad_y, int pad_x, int dilation_y, int dilation_x, const float *weight, const float *base) {
  const int each = sources / groups, area = kernel_height * kernel_width;
  for (int t = 0; t < targets; t++)
    for (int y = 0; y < out_height; y++)
      for (int x = 0; x < out_width; x++) {
        float sum = base ? base[t] : 0.0f;
        for (int s = 0; s < each; s++) {
          const float *map = in + ((long)(t / (targets / groups)) * each + s) * height * width;
          const float *w = weight + ((long)t * each + s) * area;
          for (int ky = 0; ky < kernel_height; ky++)
            for (int kx = 0; kx < kernel_width; kx++) {
              int row = y * stride_y + ky * dilation_y - pad_y, column = x * stride_x + kx * dilation_x - pad_x;
              if (row >= 0 && row < height && column >= 0 && column < width)
                sum += w[ky * kernel_width + kx] * map[row * width + column];
            }
        }
        out[((long)t * out_height + y) * out_width + x] = sum;
      }
}

/* FUNCTION sparse_convolution */
/* The weights that are not 0, target by target: each with the map that it reads and its place in the kernel. */
static void sparse_convolution(const float *in, float *out, int targets, int height, int width, int out_height, int out_width,
                               int kernel_height, int kernel_width, int stride_y, int stride_x, int pad_y, int pad_x,
                               int dilation_y, int dilation_x, const float *weight, const index_t *source, const index_t *tap,
                               const index_t *count, const float *base) {
  (void)kernel_height;
  for (int t = 0; t < targets; t++, out += (long)out_height * out_width) {
    for (long p = 0; p < (long)out_height * out_width; p++) out[p] = base ? base[t] : 0.0f;
    for (int e = 0; e < (int)count[t]; e++, weight++, source++, tap++) {
      const float *map = in + (long)*source * height * width, w = *weight;
      const int top = (int)*tap / kernel_width * dilation_y - pad_y, left = (int)*tap % kernel_width * dilation_x - pad_x;
      for (int y = 0; y < out_height; y++) {
        const int row = y * stride_y + top;
        if (row < 0 || row >= height) continue;
        for (int x = 0; x < out_width; x++) {
          const int column = x * stride_x + left;
          if (column >= 0 && column < width) out[y * out_width + x] += w * map[row * width + column];
        }
      }
    }
  }
}

/* FUNCTION affine */
static void affine(const float *in, float *out, int channels, int pixels, const float *scale, const float *shift) {
  for (int c = 0; c < channels; c++)
    for (int p = 0; p < pixels; p++, in++, out++) *out = *in * scale[c] + shift[c];
}

/* FUNCTION instance_norm */
static void instance_norm(const float *in, float *out, int channels, int pixels, const float *scale, const float *shift,
                          float eps) {
  for (int c = 0; c < channels; c++, in += pixels, out += pixels) {
    float sum = 0.0f, squares = 0.0f; /* of what differs from the first pixel: few digits are lost where a map hardly varies */
    for (int p = 0; p < pixels; p++) sum += in[p] - in[0];
    const float mean = in[0] + sum / (float)pixels;
    for (int p = 0; p < pixels; p++) squares += (in[p] - mean) * (in[p] - mean);
    const float factor = scale[c] / sqrtf(squares / (float)pixels + eps);
    for (int p = 0; p < pixels; p++) out[p] = (in[p] - mean) * factor + shift[c];
  }
}

/* FUNCTION rectify */
static void rectify(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = in[i] <= 0.0f ? 0.0f : in[i];
}

/* FUNCTION mean */
static void mean(const float *in, float *out, int channels, int pixels) {
  for (int c = 0; c < channels; c++, in += pixels) {
    float sum = 0.0f;
    for (int p = 0; p < pixels; p++) sum += in[p];
    out[c] = sum / (float)pixels;
  }
}

/* FUNCTION linear */
static void linear(const float *in, float *out, int sources, int targets, const float *weight, const float *bias) {
  for (int t = 0; t < targets; t++) {
    float sum = bias[t];
    for (int s = 0; s < sources; s++, weight++) sum += *weight * in[s];
    out[t] = sum;
  }
}

/* FUNCTION copy */
static void copy(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = in[i];
}

/* FUNCTION pick */
/* Some of the maps. */
static void pick(const float *in, float *out, int channels, int pixels, const index_t *source_channels) {
  for (int c = 0; c < channels; c++)
    for (int p = 0; p < pixels; p++) *out++ = in[(long)source_channels[c] * pixels + p];
}

/* FUNCTION restore */
/* All maps as they are when constant, then those that are not. */
static void restore(const float *in, float *out, int channels, int pixels, int maps, const index_t *target_channels,
                    const float *constant) {
  for (long i = 0; i < (long)channels * pixels; i++) out[i] = constant[i];
  for (int m = 0; m < maps; m++)
    for (int p = 0; p < pixels; p++) out[(long)target_channels[m] * pixels + p] = *in++;
}

/* FUNCTION sum */
/* Of two arrays, or of maps and a number for each. */
static void sum(const float *in, const float *other, float *out, int channels, int pixels, int numbers) {
  for (int c = 0; c < channels; c++)
    for (int p = 0; p < pixels; p++, in++, out++) *out = *in + (numbers ? other[c] : other[(long)c * pixels + p]);
}

/* FUNCTION product */
static void product(const float *in, const float *other, float *out, int channels, int pixels, int numbers) {
  for (int c = 0; c < channels; c++)
    for (int p = 0; p < pixels; p++, in++, out++) *out = *in * (numbers ? other[c] : other[(long)c * pixels + p]);
}

/* FUNCTION stretches */
/* Copies stretches of numbers that begin so many numbers apart. */
static void stretches(const float *in, float *out, int count, int length, int in_apart, int out_apart) {
  for (int i = 0; i < count; i++, in += in_apart, out += out_apart)
    for (int k = 0; k < length; k++) out[k] = in[k];
}

/* FUNCTION max_pool */
static void max_pool(const float *in, float *out, int channels, int height, int width, int out_height, int out_width,
                     int kernel_height, int kernel_width, int stride_y, int stride_x, int pad_y, int pad_x, int dilation_y,
                     int dilation_x) {
  for (int c = 0; c < channels; c++, in += (long)height * width)
    for (int y = 0; y < out_height; y++)
      for (int x = 0; x < out_width; x++) {
        float most = 0.0f;
        int none = 1;
        for (int ky = 0; ky < kernel_height; ky++)
          for (int kx = 0; kx < kernel_width; kx++) {
            const int row = y * stride_y + ky * dilation_y - pad_y, column = x * stride_x + kx * dilation_x - pad_x;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            const float value = in[row * width + column];
            if (none || value > most || value != value) most = value;
            none = 0;
          }
        *out++ = most;
      }
}

/* FUNCTION mean_pool */
static void mean_pool(const float *in, float *out, int channels, int height, int width, int out_height, int out_width,
                      int kernel_height, int kernel_width, int stride_y, int stride_x, int pad_y, int pad_x, int padded) {
  for (int c = 0; c < channels; c++, in += (long)height * width)
    for (int y = 0; y < out_height; y++)
      for (int x = 0; x < out_width; x++) {
        const int top = y * stride_y - pad_y, left = x * stride_x - pad_x;
        const int bottom = top + kernel_height < height + pad_y ? top + kernel_height : height + pad_y;
        const int right = left + kernel_width < width + pad_x ? left + kernel_width : width + pad_x;
        float total = 0.0f;
        int inside = 0;
        for (int row = top > 0 ? top : 0; row < bottom && row < height; row++)
          for (int column = left > 0 ? left : 0; column < right && column < width; column++, inside++)
            total += in[row * width + column];
        *out++ = total / (float)(padded ? (bottom - top) * (right - left) : inside);
      }
}

/* FUNCTION clamp */
static void clamp(const float *in, float *out, long count, float low, float high) {
  for (long i = 0; i < count; i++) out[i] = in[i] > high || low > high ? high : in[i] < low ? low : in[i];
}

/* FUNCTION leaky_relu */
static void leaky_relu(const float *in, float *out, long count, float slope) {
  for (long i = 0; i < count; i++) out[i] = in[i] < 0.0f ? slope * in[i] : in[i];
}

/* FUNCTION elu */
static void elu(const float *in, float *out, long count, float alpha) {
  for (long i = 0; i < count; i++) out[i] = in[i] < 0.0f ? alpha * expm1f(in[i]) : in[i];
}

/* FUNCTION sigmoid */
static void sigmoid(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = 1.0f / (1.0f + expf(-in[i]));
}

/* FUNCTION hyperbolic_tangent */
static void hyperbolic_tangent(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = tanhf(in[i]);
}

/* FUNCTION silu */
static void silu(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = in[i] / (1.0f + expf(-in[i]));
}

/* FUNCTION hardswish */
static void hardswish(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++)
    out[i] = in[i] <= -3.0f ? 0.0f * in[i] : in[i] >= 3.0f ? in[i] : in[i] * (in[i] + 3.0f) / 6.0f;
}

/* FUNCTION hardsigmoid */
static void hardsigmoid(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = in[i] <= -3.0f ? 0.0f : in[i] >= 3.0f ? 1.0f : (in[i] + 3.0f) / 6.0f;
}

/* FUNCTION gelu */
static void gelu(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++) out[i] = 0.5f * in[i] * (1.0f + erff(in[i] * 0.70710678f));
}

/* FUNCTION gelu_tanh */
static void gelu_tanh(const float *in, float *out, long count) {
  for (long i = 0; i < count; i++)
    out[i] = 0.5f * in[i] * (1.0f + tanhf(0.79788456f * (in[i] + 0.044715f * in[i] * in[i] * in[i])));
}
