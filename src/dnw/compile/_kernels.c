/* Runs a compacted network on planar float maps. _lower.py decides what is called when, and where maps lie.
 *
 * Contract: no Python, no torch, no allocation, no globals that change: everything is passed in, so any number of threads may run
 * at once. What is passed in has been checked by the caller. Plain C with the vector types of GCC and Clang; each kernel is
 * compiled for every vector width that the machine may have, and the widest that it has is used.
 */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

enum { SPREAD, EDGES, MATRIX, AFFINE, INSTANCE_NORM, RECTIFY, DEPTHWISE, CONVOLUTION, NODE, MEAN, LINEAR, COPY, ZERO, SLIDE, GATHER };

/* What a call works with. A map is rows of `pitch` floats, of which `width` mean something, and takes `plane` floats.
 *
 * Whatever the vectors are, a kernel writes all `pitch` floats of each row that it makes: none is left from another image.
 * Beyond `width` that is 0 on maps with a halo, which the `mask` is for, because nodes read their right neighbours there. On
 * other maps it is anything, NaN too: a kernel reads such a place for the same place of its target, or not at all. */
typedef struct {
  int32_t kind, relu, outside, targets, sources, others, maps;
  int32_t height, width, pitch, plane, second_plane;
  int32_t out_height, out_width, out_pitch, out_plane;
  int32_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
  float eps;
  const float *weight, *scale, *shift, *added;
  const int32_t *starts, *middles, *offsets, *channels, *mask;
} instruction;

/* One call of an instruction: which rows it makes. From and to are where row 0 of the first map lies, or would. */
typedef struct {
  int32_t instruction, first, rows, spare;
  int64_t from, second, to;
} call;

typedef struct {
  const float *input;
  float *output, *arena, *scratch;
  int32_t part, parts;
} place;

int dnw_version(void) { return 6; }

int64_t dnw_size(int32_t of_call) { return of_call ? (int64_t)sizeof(call) : (int64_t)sizeof(instruction); }

/* The share of one thread. */
static int32_t share(int32_t count, int32_t part, int32_t parts) { return (int32_t)((int64_t)count * part / parts); }

#define INLINE static inline __attribute__((always_inline))

/* Zeros from one column of a row to another. */
INLINE void blank(float *row, int32_t from, int32_t to) {
  for (int32_t x = from; x < to; x++) row[x] = 0.0f;
}

#define LANES 4
#define WIDTH(name) name##_4
#define FAST
#include "_kernels_vector.h"

#ifdef __x86_64__
#define LANES 8
#define WIDTH(name) name##_8
#define FAST __attribute__((target("avx2,fma")))
#include "_kernels_vector.h"

#define LANES 16
#define WIDTH(name) name##_16
#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "_kernels_vector.h"
#endif

/* Floats of a vector on this machine. */
int32_t dnw_lanes(void) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

static void run_one(const instruction *op, const call *now, const place *here, int32_t lanes) {
  switch (lanes) {
#ifdef __x86_64__
    case 16: run_16(op, now, here); break;
    case 8: run_8(op, now, here); break;
#endif
    default: run_4(op, now, here);
  }
}

/* Waits until all threads of an image are here. State is two numbers: how many have come, and how often all have. */
static void meet(int32_t *state, int32_t parts) {
  int32_t round = __atomic_load_n(state + 1, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(state, 1, __ATOMIC_ACQ_REL) == parts) {
    __atomic_store_n(state, 0, __ATOMIC_RELAXED);
    __atomic_store_n(state + 1, round + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int32_t spins = 0; __atomic_load_n(state + 1, __ATOMIC_ACQUIRE) == round; spins++) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
    if (spins > 1000) sched_yield();
  }
}

/* Runs a program on some images, one after the other, as one of several threads that share an arena and meet after each call.
 * Sizes are floats of one image. */
void dnw_run(const instruction *instructions, const call *calls, int32_t length, const float *input, float *output, float *arena,
             float *scratch, int64_t images, int64_t input_size, int64_t output_size, int32_t part, int32_t parts,
             int32_t *meeting, int32_t lanes) {
  place here = {input, output, arena, scratch, part, parts};
  for (int64_t i = 0; i < images; i++, here.input += input_size, here.output += output_size)
    for (int32_t n = 0; n < length; n++) {
      run_one(instructions + calls[n].instruction, calls + n, &here, lanes);
      if (parts > 1) meet(meeting, parts);
    }
}
