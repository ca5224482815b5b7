/* Trains a neural graph on a CPU: node functions and sparse edges, forwards and backwards. graph.py says what is called when.
 *
 * Contract: no Python, no torch, no allocation, no globals that change: any number of threads may work on different nodes, rows
 * or columns. Maps are [nodes, height, width, images], images innermost, in one piece; so is what the edges join, [nodes, n].
 * Sums are made in an order that does not depend on the number of threads. Plain C with the vector types of GCC and Clang; each
 * kernel is compiled for every vector width that the machine may have, and the widest that it has is used.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { NO_NORM, GIVEN_STATISTICS, BATCH_STATISTICS, INSTANCE_STATISTICS };
enum { OK, BAD_ARGUMENT };

/* Some node functions, conv(relu(norm(x))), on maps of one size. Of each node: scale and shift of the norm (null: 1 and 0), nine
 * entries of the filter, mean and reciprocal deviation, one each, or one for every image where the norm is an instance norm. */
typedef struct {
  int64_t images, height, width, out_height, out_width;
  int32_t stride, norm;
  float eps;
  const float *scale, *shift, *filter;
  float *mean, *deviation;
} nodes;

int32_t dnw_graph_version(void) { return 1; }

int64_t dnw_graph_size(void) { return (int64_t)sizeof(nodes); }

#define INLINE static inline __attribute__((always_inline))

#define LANES 4
#define WIDTH(name) name##_4
#define FAST
#include "graph_vector.h"

#ifdef __x86_64__
#define LANES 8
#define WIDTH(name) name##_8
#define FAST __attribute__((target("avx2,fma")))
#include "graph_vector.h"

#define LANES 16
#define WIDTH(name) name##_16
#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "graph_vector.h"
#endif

/* Floats of a vector on this machine. */
int32_t dnw_graph_lanes(void) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

#ifdef __x86_64__
#define BY_WIDTH(lanes, name, ...)           \
  switch (lanes) {                           \
    case 16: name##_16(__VA_ARGS__); break;  \
    case 8: name##_8(__VA_ARGS__); break;    \
    default: name##_4(__VA_ARGS__);          \
  }
#else
#define BY_WIDTH(lanes, name, ...) name##_4(__VA_ARGS__)
#endif

static int are_bad(const nodes *op, int32_t first, int32_t last) {
  return !op || op->images < 1 || op->height < 1 || op->width < 1 || op->stride < 1 || op->stride > 2 || first < 0 ||
         last < first || op->norm < NO_NORM || op->norm > INSTANCE_STATISTICS || !op->filter ||
         op->out_height != (op->height - 1) / op->stride + 1 || op->out_width != (op->width - 1) / op->stride + 1 ||
         (op->norm && (!op->mean || !op->deviation));
}

/* Scratch floats that one thread needs for nodes on maps of a width. */
int64_t dnw_nodes_scratch(int64_t width) { return 4 * (width + 2) * 16; }

/* z = conv(relu(norm(x))) of the nodes from first to before last. */
int32_t dnw_nodes_forward(const nodes *op, const float *x, float *z, int32_t first, int32_t last, float *scratch, int32_t lanes) {
  if (are_bad(op, first, last) || !x || !z || !scratch) return BAD_ARGUMENT;
  BY_WIDTH(lanes, nodes_forward, op, x, z, first, last, scratch);
  return OK;
}

/* The gradients of inputs, filters, scales and shifts from those of z; into is [nodes, 9], or null, and so on. */
int32_t dnw_nodes_backward(const nodes *op, const float *x, const float *grad, float *into_x, float *into_filter,
                           float *into_scale, float *into_shift, int32_t first, int32_t last, float *scratch, int32_t lanes) {
  if (are_bad(op, first, last) || !x || !grad || !into_x || !scratch) return BAD_ARGUMENT;
  BY_WIDTH(lanes, nodes_backward, op, x, grad, into_x, into_filter, into_scale, into_shift, first, last, scratch);
  return OK;
}

/* out[row] = sum of value * in[column] over the entries of each row, for the columns n from first to before last. */
int32_t dnw_edges(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows, const float *in, float *out,
                  int64_t n, int64_t first, int64_t last, int32_t lanes) {
  if (!starts || (!columns && starts[rows] > starts[0]) || !in || !out || n < 0 || first < 0 || last > n || last < first) return BAD_ARGUMENT;
  BY_WIDTH(lanes, edges, starts, columns, values, rows, in, out, n, first, last);
  return OK;
}

/* values[e] (+)= sum over n of left[row] * right[column], for the entries of the rows from first to before last. */
int32_t dnw_edge_gradients(const int64_t *starts, const int32_t *columns, float *values, const float *left, const float *right,
                           int64_t n, int64_t first, int64_t last, int32_t lanes) {
  if (!starts || !values || !left || !right || n < 0 || first < 0 || last < first) return BAD_ARGUMENT;
  BY_WIDTH(lanes, edge_gradients, starts, columns, values, left, right, n, first, last);
  return OK;
}

/* Sums, or means, over squares of two by two places of maps [height, width, images]; a last row or column stands alone. */
int32_t dnw_pooled(const float *in, float *out, int64_t height, int64_t width, int64_t images, int32_t mean, int64_t first,
                   int64_t last) {
  if (!in || !out || height < 1 || width < 1 || images < 1 || first < 0 || last < first) return BAD_ARGUMENT;
  int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
  for (int64_t map = first; map < last; map++)
    for (int64_t y = 0; y < rows; y++)
      for (int64_t x = 0; x < columns; x++) {
        float *target = out + ((map * rows + y) * columns + x) * images;
        int32_t down = 2 * y + 1 < height, right = 2 * x + 1 < width;
        const float *from = in + ((map * height + 2 * y) * width + 2 * x) * images;
        const float *beside = from + (right ? images : 0), *below = from + (down ? width * images : 0);
        const float *across = below + (right ? images : 0);
        float a = right ? 1.0f : 0.0f, b = down ? 1.0f : 0.0f, whole = mean ? 1.0f / ((1.0f + a) * (1.0f + b)) : 1.0f;
        for (int64_t i = 0; i < images; i++) target[i] = whole * (from[i] + a * beside[i] + b * below[i] + a * b * across[i]);
      }
  return OK;
}

/* The active entries of a weight as compressed rows. Row r is row order[r] of the weight, of which it has the entries of the
 * columns before limits[r]. Fills starts, and, as far as there is room, columns and values; returns how many entries there are, or
 * -1. */
int64_t dnw_compress(const uint8_t *active, const float *weight, int64_t width, const int64_t *order, const int64_t *limits,
                     int64_t rows, int64_t *starts, int32_t *columns, float *values, int64_t room) {
  if (!active || !weight || !order || !limits || !starts || rows < 0 || width < 0 || width > INT32_MAX) return -1;
  int64_t many = 0;
  for (int64_t r = 0; r < rows; r++) {
    const uint8_t *mask = active + order[r] * width;
    const float *from = weight + order[r] * width;
    int64_t c = 0, limit = limits[r];
    if (limit < 0 || limit > width) return -1;
    starts[r] = many;
    while (c < limit) {
      uint64_t word = 1;
      if (c + 8 <= limit) memcpy(&word, mask + c, 8);
      if (!word) {
        c += 8;
        continue;
      }
      for (int64_t stop = c + 8 < limit ? c + 8 : limit; c < stop; c++)
        if (mask[c]) {
          if (many < room) columns[many] = (int32_t)c, values[many] = from[c];
          many++;
        }
    }
  }
  starts[rows] = many;
  return many;
}

/* The same entries by columns: those of column c say in which rows they are. `next` is scratch, one number for each column. */
int32_t dnw_transpose(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows, int64_t width,
                      int64_t *column_starts, int32_t *in_rows, float *in_values, int64_t *next) {
  if (!starts || !column_starts || !next || rows < 0 || rows > INT32_MAX || width < 0) return BAD_ARGUMENT;
  int64_t many = starts[rows], sum = 0;
  memset(next, 0, (size_t)width * sizeof *next);
  for (int64_t e = 0; e < many; e++) next[columns[e]]++;
  for (int64_t c = 0; c < width; c++) {
    int64_t count = next[c];
    column_starts[c] = next[c] = sum;
    sum += count;
  }
  column_starts[width] = sum;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t e = starts[r]; e < starts[r + 1]; e++) {
      int64_t at = next[columns[e]]++;
      in_rows[at] = (int32_t)r;
      in_values[at] = values[e];
    }
  return OK;
}

/* Adds the values of compressed rows to a matrix, where they came from, or puts them there. */
int32_t dnw_scatter(const int64_t *starts, const int32_t *columns, const float *values, const int64_t *order, int64_t rows,
                    int64_t width, float *matrix, int32_t adds) {
  if (!starts || !order || !matrix || rows < 0 || width < 0) return BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; r++) {
    float *to = matrix + order[r] * width;
    for (int64_t e = starts[r]; e < starts[r + 1]; e++) to[columns[e]] = adds ? to[columns[e]] + values[e] : values[e];
  }
  return OK;
}
