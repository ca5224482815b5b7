/* Plain C99 for every kind of task; save_c puts what a network needs into its file, where index_t is declared. Maps lie one
 * after the other, row by row. Each function stands behind a line with its name, and before the next such line. */

/* FUNCTION edges */
/* Each target is its base plus the weighted sum of its sources; the first sources lie in one array, all others in a second. */
static void edges(const float *in, const float *second, int sources, float *out, int targets, int pixels, const float *weight,
                  const index_t *source, const index_t *count, const float *base) {
  for (int t = 0; t < targets; t++, out += pixels) {
    for (int p = 0; p < pixels; p++) out[p] = base ? base[t] : 0.0f;
    for (int e = 0; e < (int)count[t]; e++, weight++, source++) {
      const int s = (int)*source;
      const float *map = s < sources ? in + (long)s * pixels : second + (long)(s - sources) * pixels;
      const float w = *weight;
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
/* From all maps to all maps, or each map by itself. */
static void convolution(const float *in, float *out, int sources, int targets, int depthwise, int height, int width,
                        int out_height, int out_width, int kernel_height, int kernel_width, int stride_y, int stride_x,
                        int pad_y, int pad_x, const float *weight, const float *base) {
  for (int t = 0; t < targets; t++)
    for (int y = 0; y < out_height; y++)
      for (int x = 0; x < out_width; x++) {
        float sum = base ? base[t] : 0.0f;
        for (int s = 0; s < (depthwise ? 1 : sources); s++) {
          const float *map = in + (long)(depthwise ? t : s) * height * width;
          const float *w = weight + ((long)t * (depthwise ? 1 : sources) + s) * kernel_height * kernel_width;
          for (int ky = 0; ky < kernel_height; ky++)
            for (int kx = 0; kx < kernel_width; kx++) {
              int row = y * stride_y + ky - pad_y, column = x * stride_x + kx - pad_x;
              if (row >= 0 && row < height && column >= 0 && column < width)
                sum += w[ky * kernel_width + kx] * map[row * width + column];
            }
        }
        out[((long)t * out_height + y) * out_width + x] = sum;
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
/* Over rows and columns from start to stop. */
static void mean(const float *in, float *out, int channels, int height, int width, int start, int stop) {
  const int bottom = stop < height ? stop : height, right = stop < width ? stop : width;
  for (int c = 0; c < channels; c++, in += height * width) {
    float sum = 0.0f;
    for (int y = start; y < bottom; y++)
      for (int x = start; x < right; x++) sum += in[y * width + x];
    out[c] = sum / (float)((bottom - start) * (right - start));
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
