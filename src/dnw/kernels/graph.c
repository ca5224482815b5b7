/* Trains a neural graph on a CPU: node functions and sparse edges, forwards and backwards. _graph.py calls it.
 *
 * Contract: no Python, no torch, no allocation, no globals that change: any number of threads may work on different nodes, rows
 * or columns. Each function looks at its sizes and pointers, and returns a negative number where it does not take them
 * (errors.h); that so much memory is there is for the caller to see to. Maps are [nodes, height, width, images], images
 * innermost, in one piece; so is what the edges join, [nodes, n]. Sums are made in an order that does not depend on the number
 * of threads. Plain C with the vector types of GCC and Clang; each kernel is compiled for every vector width that the machine
 * may have, and the widest that it has is used. No kernel reads or writes beyond the numbers that it is given. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "errors.h"

enum { CACHE = 1 << 19 }; /* bytes that stay near */
enum { COLUMNS = 128 };   /* of a matrix that are taken at a time where rows lie far apart */
enum { NO_NORM, GIVEN_STATISTICS, BATCH_STATISTICS, INSTANCE_STATISTICS };

/* Some node functions, conv(relu(norm(x))), on maps of one size. Of each node: scale and shift of the norm (null: 1 and 0),
 * nine entries of the filter, mean and reciprocal deviation, one each, or one for every image where the norm is an instance
 * norm. */
typedef struct {
  int64_t images, height, width, out_height, out_width;
  int32_t stride, norm;
  float eps;
  const float *scale, *shift, *filter;
  float *mean, *deviation;
} nodes;

int32_t dnw_version(void) { return 3; }

int32_t dnw_size_of_nodes(void) { return (int32_t)sizeof(nodes); }

/* How many columns of so many rows stay in a second-level cache: a multiple of COLUMNS. */
static int64_t columns_at_a_time(int64_t rows) {
  int64_t tiles = CACHE / (COLUMNS * (int64_t)sizeof(float)) / (rows + 1);
  return COLUMNS * (tiles < 1 ? 1 : tiles);
}

#define KERNELS "graph_vector.h"
#include "widths.h"

/* 0, or what is wrong with some nodes, of which those from first to before last are asked for. */
static int32_t wrong_with(const nodes *op, int64_t first, int64_t last, const float *scratch, int64_t room, int32_t lanes) {
  REFUSE_IF(!op || !op->filter || !scratch || (op->norm && (!op->mean || !op->deviation)), NULL_POINTER);
  REFUSE_IF(op->norm < NO_NORM || op->norm > INSTANCE_STATISTICS, UNKNOWN_KIND);
  REFUSE_IF(!has_lanes(lanes), UNKNOWN_VECTOR);
  REFUSE_IF(op->images < 1 || op->height < 1 || op->width < 1 || op->stride < 1 || op->stride > 2, BAD_SIZE);
  REFUSE_IF(op->out_height != (op->height - 1) / op->stride + 1 || op->out_width != (op->width - 1) / op->stride + 1, BAD_SIZE);
  REFUSE_IF(first < 0 || last < first || room < 4 * (op->width + 2) * lanes, BAD_SIZE);
  return 0;
}

/* z = conv(relu(norm(x))) of the nodes from first to before last. Scratch is four rows of a map, with a zero on either side. */
int32_t dnw_nodes_forward(const nodes *op, const float *x, float *z, int64_t first, int64_t last, float *scratch, int64_t room,
                          int32_t lanes) {
  int32_t wrong = wrong_with(op, first, last, scratch, room, lanes);
  if (wrong) return wrong;
  REFUSE_IF(!x || !z, NULL_POINTER);
  BY_WIDTH(lanes, nodes_forward, op, x, z, first, last, scratch);
  return 0;
}

/* The gradients of inputs, filters, scales and shifts from those of z. */
int32_t dnw_nodes_backward(const nodes *op, const float *x, const float *grad, float *into_x, float *into_filter,
                           float *into_scale, float *into_shift, int64_t first, int64_t last, float *scratch, int64_t room,
                           int32_t lanes) {
  int32_t wrong = wrong_with(op, first, last, scratch, room, lanes);
  if (wrong) return wrong;
  REFUSE_IF(!x || !grad || !into_x || !into_filter || !into_scale || !into_shift, NULL_POINTER);
  BY_WIDTH(lanes, nodes_backward, op, x, grad, into_x, into_filter, into_scale, into_shift, first, last, scratch);
  return 0;
}

/* out[row] = sum of value * in[column] over the entries of each row, for the columns n from first to before last. The rows of
 * in that entries have to do with are those from least to before width. Scratch, or null, is COLUMNS floats for each row of in:
 * what is read over and over is then brought together first. */
int32_t dnw_edges(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows, int64_t least,
                  int64_t width, const float *in, float *out, int64_t n, int64_t first, int64_t last, float *scratch,
                  int64_t room, int32_t lanes) {
  REFUSE_IF(rows < 0 || least < 0 || width < least || n < 0 || first < 0 || last > n || last < first, BAD_SIZE);
  REFUSE_IF(!starts || !in || !out || (starts[rows] > starts[0] && (!columns || !values)), NULL_POINTER);
  REFUSE_IF(scratch && room < width * COLUMNS, BAD_SIZE);
  REFUSE_IF(!has_lanes(lanes), UNKNOWN_VECTOR);
  BY_WIDTH(lanes, edges, starts, columns, values, rows, least, width, in, out, n, first, last, scratch);
  return 0;
}

/* The same, and gradients[e - starts[0]] += sum of in[column] * states[row] over these n: the way back along edges, where
 * entries are by source, in the gradients at the targets, out those at the sources, and states what the sources have sent. */
int32_t dnw_edges_back(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows, int64_t least,
                       int64_t width, const float *in, const float *states, float *out, float *gradients, int64_t n,
                       int64_t first, int64_t last, float *scratch, int64_t room, int32_t lanes) {
  REFUSE_IF(rows < 0 || least < 0 || width < least || n < 0 || first < 0 || last > n || last < first, BAD_SIZE);
  REFUSE_IF(!starts || !in || !states || !out, NULL_POINTER);
  REFUSE_IF(starts[rows] > starts[0] && (!columns || !values || !gradients), NULL_POINTER);
  REFUSE_IF(scratch && room < width * COLUMNS, BAD_SIZE);
  REFUSE_IF(!has_lanes(lanes), UNKNOWN_VECTOR);
  BY_WIDTH(lanes, edges_back, starts, columns, values, rows, least, width, in, states, out, gradients, n, first, last, scratch);
  return 0;
}

/* out[column][row] = in[row][column], for the columns from first to before last. */
int32_t dnw_turned(const float *in, float *out, int64_t rows, int64_t columns, int64_t first, int64_t last) {
  REFUSE_IF(rows < 0 || columns < 0 || first < 0 || last > columns || last < first, BAD_SIZE);
  REFUSE_IF(rows > 0 && last > first && (!in || !out), NULL_POINTER);
  enum { HIGH = 16, WIDE = 64 };
  for (int64_t c = first; c < last; c += WIDE)
    for (int64_t r = 0; r < rows; r += HIGH) {
      float square[HIGH][WIDE]; /* rows that lie a power of 2 apart drive each other out of the cache: each is read once */
      int64_t wide = last - c < WIDE ? last - c : WIDE, high = rows - r < HIGH ? rows - r : HIGH;
      for (int64_t i = 0; i < high; i++) memcpy(square[i], in + (r + i) * columns + c, (size_t)wide * sizeof(float));
      for (int64_t k = 0; k < wide; k++)
        for (int64_t i = 0; i < high; i++) out[(c + k) * rows + r + i] = square[i][k];
    }
  return 0;
}

/* Sums, or means, over squares of two by two pixels of maps [height, width, images]; a last row or column stands alone. */
int32_t dnw_pooled(const float *in, void *out, int64_t height, int64_t width, int64_t images, int32_t mean, int32_t bfloat16,
                   int64_t first, int64_t last, int32_t lanes) {
  REFUSE_IF(height < 1 || width < 1 || images < 1 || first < 0 || last < first, BAD_SIZE);
  REFUSE_IF(!in || !out, NULL_POINTER);
  REFUSE_IF(!has_lanes(lanes), UNKNOWN_VECTOR);
  BY_WIDTH(lanes, pooled, in, out, height, width, images, mean, bfloat16, first, last);
  return 0;
}

/* How many active entries each row has. Row r is row order[r] of the weight, of which it has the entries of the columns before
 * limits[r]. */
int32_t dnw_count(const uint8_t *active, int64_t width, const int64_t *order, const int64_t *limits, int64_t first,
                  int64_t last, int64_t *counts) {
  REFUSE_IF(width < 0 || first < 0 || last < first, BAD_SIZE);
  REFUSE_IF(last > first && (!active || !order || !limits || !counts), NULL_POINTER);
  for (int64_t r = first; r < last; r++) REFUSE_IF(limits[r] < 0 || limits[r] > width || order[r] < 0, BAD_SIZE);
  for (int64_t r = first; r < last; r++) {
    const uint8_t *mask = active + order[r] * width;
    int64_t many = 0;
    for (int64_t c = 0; c < limits[r]; c++) many += mask[c] != 0;
    counts[r] = many;
  }
  return 0;
}

/* 64 entries of a mask, the first in the lowest bit. */
static inline uint64_t bits_of(const uint8_t *mask) {
  uint64_t bits = 0;
  for (int byte = 0; byte < 8; byte++) {
    uint64_t eight;
    memcpy(&eight, mask + 8 * byte, 8);
    bits |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
  }
  return bits;
}

/* These entries as compressed rows, of which starts says where each begins. */
int32_t dnw_compress(const uint8_t *active, const float *weight, int64_t width, const int64_t *order, const int64_t *limits,
                     const int64_t *starts, int64_t first, int64_t last, int32_t *columns, float *values) {
  REFUSE_IF(width < 0 || width > INT32_MAX || first < 0 || last < first, BAD_SIZE);
  REFUSE_IF(!starts || (last > first && (!active || !weight || !order || !limits)), NULL_POINTER);
  REFUSE_IF(starts[last] > starts[first] && (!columns || !values), NULL_POINTER);
  for (int64_t r = first; r < last; r++) REFUSE_IF(limits[r] < 0 || limits[r] > width || order[r] < 0, BAD_SIZE);
  for (int64_t r = first; r < last; r++) {
    const uint8_t *mask = active + order[r] * width;
    const float *from = weight + order[r] * width;
    int64_t e = starts[r], stop = starts[r + 1], c = 0;
    for (; c + 64 <= limits[r]; c += 64)
      for (uint64_t bits = bits_of(mask + c); bits && e < stop; bits &= bits - 1) {
        columns[e] = (int32_t)(c + __builtin_ctzll(bits));
        __builtin_prefetch(from + columns[e++]); /* values lie far apart */
      }
    for (; c < limits[r] && e < stop; c++)
      if (mask[c]) columns[e++] = (int32_t)c;
    for (int64_t i = starts[r]; i < e; i++) values[i] = from[columns[i]];
    for (; e < stop; e++) columns[e] = 0, values[e] = 0; /* the mask has changed meanwhile */
  }
  return 0;
}

/* The same entries by columns: those of column c say in which rows they are. `next` is scratch, one number for each column. */
int32_t dnw_transpose(const int64_t *starts, const int32_t *columns, const float *values, int64_t rows, int64_t width,
                      int64_t *column_starts, int32_t *in_rows, float *in_values, int64_t *next) {
  REFUSE_IF(rows < 0 || rows > INT32_MAX || width < 0, BAD_SIZE);
  REFUSE_IF(!starts || !column_starts || (width > 0 && !next), NULL_POINTER);
  REFUSE_IF(starts[0], BAD_SIZE);
  int64_t many = starts[rows], sum = 0;
  REFUSE_IF(many > 0 && (!columns || !values || !in_rows || !in_values), NULL_POINTER);
  if (width) memset(next, 0, (size_t)width * sizeof *next);
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
  return 0;
}

/* Adds a value of each entry to a matrix [rows, width], or puts it there; entries are by column, and row r is row order[r]. */
int32_t dnw_scatter(const int64_t *starts, const int32_t *rows, const float *values, const int64_t *order, int64_t first,
                    int64_t last, int64_t width, float *matrix, int32_t adds) {
  REFUSE_IF(width < 0 || first < 0 || last > width || last < first, BAD_SIZE);
  REFUSE_IF(!starts || !order || !matrix || (starts[last] > starts[first] && (!rows || !values)), NULL_POINTER);
  for (int64_t c = first; c < last; c++)
    for (int64_t e = starts[c]; e < starts[c + 1]; e++) {
      float *to = matrix + order[rows[e]] * width + c;
      *to = adds ? *to + values[e] : values[e];
    }
  return 0;
}

/* --- several calls at once --- */

enum { NODES_FORWARD, NODES_BACKWARD, EDGES, EDGES_BACK, TURNED, POOLED, COUNT, COMPRESS };

#define P(i) ((void *)(intptr_t)a[i])
#define N(i) ((int32_t)a[i])

/* One call of a kernel, all of whose arguments are given as whole numbers. */
static int32_t run_call(int32_t kernel, const int64_t *a) {
  switch (kernel) {
    case NODES_FORWARD: return dnw_nodes_forward(P(0), P(1), P(2), a[3], a[4], P(5), a[6], N(7));
    case NODES_BACKWARD:
      return dnw_nodes_backward(P(0), P(1), P(2), P(3), P(4), P(5), P(6), a[7], a[8], P(9), a[10], N(11));
    case EDGES:
      return dnw_edges(P(0), P(1), P(2), a[3], a[4], a[5], P(6), P(7), a[8], a[9], a[10], P(11), a[12], N(13));
    case EDGES_BACK:
      return dnw_edges_back(P(0), P(1), P(2), a[3], a[4], a[5], P(6), P(7), P(8), P(9), a[10], a[11], a[12], P(13), a[14],
                            N(15));
    case TURNED: return dnw_turned(P(0), P(1), a[2], a[3], a[4], a[5]);
    case POOLED: return dnw_pooled(P(0), P(1), a[2], a[3], a[4], N(5), N(6), a[7], a[8], N(9));
    case COUNT: return dnw_count(P(0), a[1], P(2), P(3), a[4], a[5], P(6));
    case COMPRESS: return dnw_compress(P(0), P(1), a[2], P(3), P(4), P(5), a[6], a[7], P(8), P(9));
    default: return -UNKNOWN_KIND;
  }
}

typedef struct {
  const int64_t *arguments;
  int64_t size, many, next, refused;
  int32_t kernel;
} calls;

/* What every thread does: one call after the other, as long as there are some. */
static void take_calls(void *data) {
  calls *all = data;
  for (int64_t i; (i = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->many;)
    if (run_call(all->kernel, all->arguments + i * all->size) < 0) __atomic_fetch_add(&all->refused, 1, __ATOMIC_RELAXED);
}

/* Runs many calls of a kernel, each with `size` arguments, by so many threads of an OpenMP runtime, into which `parallel` is
 * the way; by this thread where it is null. Returns how many calls were refused. */
int32_t dnw_run_calls(void *parallel, int32_t threads, int32_t kernel, const int64_t *arguments, int64_t size, int64_t many) {
  REFUSE_IF(size < 0 || many < 0 || many > INT32_MAX || threads < 1, BAD_SIZE);
  REFUSE_IF(many > 0 && !arguments, NULL_POINTER);
  calls all = {arguments, size, many, 0, 0, kernel};
  if (parallel && threads > 1)
    ((void (*)(void (*)(void *), void *, unsigned, unsigned))parallel)(take_calls, &all, (unsigned)threads, 0);
  else
    take_calls(&all);
  return (int32_t)all.refused;
}
