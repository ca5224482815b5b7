/* Runs a compacted network on planar float maps. _lower.py decides which kernel is called when, and where maps lie.
 *
 * Contract: no Python, no torch, no allocation, no globals that change: everything is passed in, so any number of threads may
 * run at once. dnw_check holds tasks and calls to the memory that they are for, once; dnw_run then runs them any number of
 * times. Plain C with the vector types of GCC
 * and Clang; each kernel is compiled for every vector width that the machine may have, and the widest that it has is used. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#include "../kernels/errors.h"

/* The kernels, and the fields of the records that say what they do. Python reads these tables from the library (dnw_names). */
/* clang-format off */
#define KINDS(X) \
  X(spread) X(affine) X(instance_norm) X(rectify) X(node) X(mean) X(linear) \
  X(copy) X(zero) X(slide) X(gather) \
  X(sparse) X(dense) X(phases) X(sum) X(product) X(pool) X(adaptive_mean) X(rearrange) X(layer_norm) X(group_norm) X(attention)
#define ACTIVATIONS(X) \
  X(none) X(relu) X(clamp) X(leaky_relu) X(elu) X(sigmoid) X(tanh) X(silu) X(hardswish) X(hardsigmoid) X(gelu) X(gelu_tanh)
#define INTEGERS(X) \
  X(kind) X(relu) X(outside) X(targets) X(sources) X(second_sources) \
  X(height) X(width) X(pitch) X(plane) X(second_plane) X(added_plane) \
  X(out_height) X(out_width) X(out_pitch) X(out_plane) \
  X(kernel_height) X(kernel_width) X(stride_y) X(stride_x) X(pad_y) X(pad_x) X(dilation_y) X(dilation_x) \
  X(third_plane) X(activation) X(taps) X(blocks) X(groups) X(largest) X(padded) X(clear) X(tile)
#define FLOATS(X) X(eps) X(reciprocal) X(first) X(second)
#define FLOAT_ARRAYS(X) X(weight) X(scale) X(shift) X(added)
#define INTEGER_ARRAYS(X) X(starts) X(middles) X(offsets) X(source_channels) X(added_maps) X(mask)
#define CALL_INTEGERS(X) X(task) X(first) X(rows)
#define CALL_OFFSETS(X) X(in_offset) X(second_offset) X(third_offset) X(out_offset)
/* clang-format on */

#define KIND(name) KIND_##name
#define KIND_NUMBER(name) KIND(name),
#define INT32_FIELD(name) int32_t name;
#define INT64_FIELD(name) int64_t name;
#define FLOAT_FIELD(name) float name;
#define FLOAT_ARRAY_FIELD(name) const float *name;
#define INT32_ARRAY_FIELD(name) const int32_t *name;

#define ACTIVATION(name) ACTIVATION_##name
#define ACTIVATION_NUMBER(name) ACTIVATION(name),

enum { KINDS(KIND_NUMBER) NUM_KINDS };
enum { ACTIVATIONS(ACTIVATION_NUMBER) NUM_ACTIVATIONS };

/* What a kernel works with, from the maps of its sources to those of its targets. A map is rows of `pitch` floats, of which
 * `width` mean something, and takes `plane` floats.
 *
 * - outside: whether the sources are the images of a user; second_sources: of what is added or multiplied
 * - eps: what instance norms add to variances; reciprocal: one over the number of pixels that a mean is of
 * - added: maps that are added to some targets, each of added_plane floats; added_maps: which to which target, -1 for none
 * - starts: where a target's edges begin; offsets: where their sources lie
 * - source_channels: which source a target is a copy of, -1 for the map that is added instead
 * - mask: all bits of each pixel that is kept
 * - activation: of what comes out, with its numbers first and second
 * - sparse, dense: offsets are where the pixels lie that a target's first pixel reads; edges come in so many blocks, each with
 *   its own starts of targets + 1, and so many times 16 pixels at a time (tile); dense: so many taps
 * - phases: so many blocks of each source, from a row (starts) and a column (middles) on
 * - rearrange: so many taps, from offsets to middles; clear: all others become 0
 * - largest, padded: of a pool
 * - groups: of the channels of a norm, and heads of attention
 *
 * Whatever the vectors are, a kernel writes all `pitch` floats of each row that it makes: none is left from another image.
 * Beyond `width` that is 0 on maps with a halo, which the `mask` is for, because nodes read their right neighbours there. On
 * other maps it is anything, NaN too: a kernel reads such a pixel for the same pixel of its target, or not at all. */
struct task {
  INTEGERS(INT32_FIELD)
  FLOATS(FLOAT_FIELD)
  FLOAT_ARRAYS(FLOAT_ARRAY_FIELD)
  INTEGER_ARRAYS(INT32_ARRAY_FIELD)
};

/* One call of a task: which rows it makes. The offsets are where row 0 of the first map lies, or would lie. */
struct call {
  CALL_INTEGERS(INT32_FIELD)
  CALL_OFFSETS(INT64_FIELD)
};

/* What a thread of a run works in. */
struct context {
  const float *images;
  float *outputs, *arena, *scratch;
  int32_t thread, threads;
};

/* Marks a kernel that works in whole vectors, wherever its rows end: it reads up to OVER_READ floats behind the last one, and
 * writes up to the end of the vector. That is the next row, the next map, or behind the last map room of nobody, which
 * _lower.py leaves (_SLACK); dnw_check refuses a call without it. Nothing that means something is made of what is read there,
 * and what is written there is 0 (the mask), is written again by the target that it belongs to, or means nothing. */
#define OVER_READS
enum { OVER_READ = 32 }; /* two vectors of the widest kind */

/* The items of a thread: from begin on, and before end. */
static int32_t begin(const struct context *context, int32_t count) {
  return (int32_t)((int64_t)count * context->thread / context->threads);
}

static int32_t end(const struct context *context, int32_t count) {
  return (int32_t)((int64_t)count * (context->thread + 1) / context->threads);
}

/* The map that is added to a target; a null pointer where none is. */
static inline const float *added_map(const struct task *task, int32_t target) {
  if (!task->added_maps || task->added_maps[target] < 0) return 0;
  return task->added + (int64_t)task->added_maps[target] * task->added_plane;
}

/* Zeros from one column of a row to another. */
static inline void blank(float *row, int32_t from, int32_t to) {
  for (int32_t x = from; x < to; x++) row[x] = 0.0f;
}

#define KERNELS "../compile/_kernels_vector.h"
#include "../kernels/widths.h"

/* Waits until all threads of an image are here. A meeting is two numbers: how many have come, and how often all have. */
static void meet(int32_t *meeting, int32_t threads) {
  int32_t round = __atomic_load_n(meeting + 1, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(meeting, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(meeting, 0, __ATOMIC_RELAXED);
    __atomic_store_n(meeting + 1, round + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int32_t spins = 0; __atomic_load_n(meeting + 1, __ATOMIC_ACQUIRE) == round; spins++) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
    if (spins > 1000) sched_yield();
  }
}

/* --- what Python calls --- */

int32_t dnw_version(void) { return 9; }

/* The names of a table, in order, each after a blank; a null pointer where there is no such table. */
const char *dnw_names(int32_t table) {
#define WORD(name) " " #name
  static const char *const tables[] = {KINDS(WORD),          INTEGERS(WORD),      FLOATS(WORD),      FLOAT_ARRAYS(WORD),
                                       INTEGER_ARRAYS(WORD), CALL_INTEGERS(WORD), CALL_OFFSETS(WORD), ACTIVATIONS(WORD)};
  return table >= 0 && table < (int32_t)(sizeof tables / sizeof *tables) ? tables[table] : 0;
#undef WORD
}

/* Whether a task has the arrays and the sizes that its kernel takes for granted. */
static int32_t check_task(const struct task *task) {
#define REFUSE_NEGATIVE(name) REFUSE_IF(task->name < 0, BAD_SIZE);
  INTEGERS(REFUSE_NEGATIVE)
#undef REFUSE_NEGATIVE
  REFUSE_IF(task->kind >= NUM_KINDS, UNKNOWN_KIND);
  REFUSE_IF(task->activation >= NUM_ACTIVATIONS, UNKNOWN_KIND);
  REFUSE_IF(task->added_maps && !task->added, NULL_POINTER);
  switch (task->kind) {
    case KIND(sparse):
      REFUSE_IF(!task->starts || task->blocks < 1, NULL_POINTER);
      REFUSE_IF(task->out_plane == 1 ? task->blocks != 1 : task->pitch != task->out_pitch, BAD_SIZE);
      for (int64_t i = 0, count = (int64_t)task->blocks * (task->targets + 1); i < count; i++)
        REFUSE_IF(task->starts[i] < (i ? task->starts[i - 1] : 0) || task->starts[i] > task->taps, BAD_SIZE);
      REFUSE_IF(task->taps > 0 && (!task->weight || !task->offsets), NULL_POINTER);
      break;
    case KIND(dense):
      REFUSE_IF(task->taps > 0 && (!task->weight || !task->offsets), NULL_POINTER);
      REFUSE_IF(task->pitch != task->out_pitch, BAD_SIZE);
      break;
    case KIND(phases):
      REFUSE_IF(!task->starts || !task->middles, NULL_POINTER);
      REFUSE_IF(task->blocks < 1 || !task->stride_y || !task->stride_x, BAD_SIZE);
      REFUSE_IF(task->targets != (int64_t)task->sources * task->blocks, BAD_SIZE);
      break;
    case KIND(sum):
    case KIND(product): REFUSE_IF(task->pitch != task->out_pitch || task->targets != task->sources, BAD_SIZE); break;
    case KIND(pool):
      REFUSE_IF(!task->kernel_height || !task->kernel_width || !task->stride_y || !task->stride_x, BAD_SIZE);
      REFUSE_IF(!task->dilation_y || !task->dilation_x || task->targets != task->sources, BAD_SIZE);
      break;
    case KIND(adaptive_mean):
      REFUSE_IF(!task->out_height || !task->out_width || task->targets != task->sources, BAD_SIZE);
      break;
    case KIND(rearrange): REFUSE_IF(task->taps > 0 && (!task->offsets || !task->middles), NULL_POINTER); break;
    case KIND(layer_norm):
    case KIND(group_norm):
      REFUSE_IF(!task->scale || !task->shift, NULL_POINTER);
      REFUSE_IF(!task->groups || task->targets % task->groups || task->targets != task->sources, BAD_SIZE);
      break;
    case KIND(attention):
      REFUSE_IF(!task->groups || task->targets % task->groups || task->sources % task->groups, BAD_SIZE);
      break;
    case KIND(instance_norm): REFUSE_IF(!task->scale || !task->shift, NULL_POINTER); /* fall through */
    case KIND(affine):
    case KIND(rectify): REFUSE_IF(task->pitch != task->out_pitch, BAD_SIZE); break;
    case KIND(node):
      REFUSE_IF(task->kernel_height != 3 || task->kernel_width != 3 || task->pad_y != 1 || task->pad_x != 1, BAD_SIZE);
      REFUSE_IF(task->stride_y != task->stride_x || task->stride_y > 2, BAD_SIZE);
      REFUSE_IF(task->stride_y == 1 && task->pitch != task->out_pitch, BAD_SIZE);
      REFUSE_IF(!task->weight, NULL_POINTER);
      REFUSE_IF(!task->stride_y || !task->pitch, BAD_SIZE);
      break;
    case KIND(mean): REFUSE_IF(!task->mask, NULL_POINTER); break;
    case KIND(linear): REFUSE_IF(!task->weight || !task->shift, NULL_POINTER); break;
    case KIND(copy):
      for (int32_t t = 0; task->source_channels && t < task->targets; t++) {
        REFUSE_IF(task->source_channels[t] >= task->sources, BAD_SIZE);
        REFUSE_IF(task->source_channels[t] < 0 && !task->added, NULL_POINTER);
      }
  }
  return 0;
}

/* Whether rows of some maps lie in memory of some floats, with so many behind them. */
static int lie_within(int64_t size, int64_t offset, int32_t maps, int32_t plane, int64_t first, int64_t stop, int32_t pitch,
                      int32_t behind) {
  const int64_t most = (int64_t)1 << 40;
  if (maps == 0 || stop <= first) return 1;
  return -most < offset && offset < most && offset + first * pitch >= 0 &&
         offset + (int64_t)(maps - 1) * plane + stop * pitch + behind <= size;
}

/* Whether a call reads and writes within the floats that there are of one image, its outputs, the arena and the scratch. */
static int32_t check_call(const struct task *task, const struct call *call, int64_t image_size, int64_t output_size,
                          int64_t arena_size, int64_t scratch_size) {
  int64_t first = call->first, stop = first + call->rows, from = 0, to = task->height; /* rows of targets, and of sources */
  int32_t behind = 0, sources = task->sources;
  REFUSE_IF(call->rows < 0 || first < -(1 << 20), BAD_SIZE);
  switch (task->kind) {
    case KIND(node):
      from = first * task->stride_y - 1, to = (stop - 1) * task->stride_y + 2, behind = OVER_READ;
      if (16 % task->pitch && task->pitch % 16) from--; /* the left neighbours of the first row's first pixel */
      break;
    case KIND(copy):
      if (!task->source_channels) break;
      sources = 0;
      for (int32_t t = 0; t < task->targets; t++)
        if (task->source_channels[t] >= sources) sources = task->source_channels[t] + 1;
      break;
    case KIND(zero): sources = 0; break;
    case KIND(sparse):
    case KIND(dense): {
      int64_t room = task->out_plane == 1 ? 1 : (int64_t)call->rows * task->pitch + OVER_READ, at = first * task->pitch;
      for (int32_t i = 0; i < task->taps; i++) {
        int64_t offset = call->in_offset + at + task->offsets[i];
        REFUSE_IF(offset < 0 || offset + room > arena_size, OUT_OF_BOUNDS);
      }
      sources = 0, from = first, to = stop, behind = task->out_plane == 1 ? 0 : OVER_READ;
      break;
    }
    case KIND(sum):
    case KIND(product):
      from = first, to = stop;
      if (task->second_plane == 1 && task->plane != 1) {
        REFUSE_IF(call->second_offset < 0 || call->second_offset + task->second_sources > arena_size, OUT_OF_BOUNDS);
        REFUSE_IF(!lie_within(arena_size, call->in_offset, sources, task->plane, from, to, task->pitch, OVER_READ),
                  OUT_OF_BOUNDS);
        REFUSE_IF(
            !lie_within(arena_size, call->out_offset, task->targets, task->out_plane, first, stop, task->out_pitch, OVER_READ),
            OUT_OF_BOUNDS);
        return 0;
      }
      behind = task->plane == 1 ? 0 : OVER_READ;
      break;
    case KIND(phases):
      from = first * task->stride_y - task->pad_y, to = task->height;
      from = from > 0 ? from : 0;
      break;
    case KIND(pool): {
      int64_t line = ((int64_t)task->out_width + 16) * task->stride_x + (int64_t)task->kernel_width * task->dilation_x + 32;
      REFUSE_IF(line > scratch_size || (int64_t)task->width + task->pad_x > line, OUT_OF_BOUNDS);
      from = first * task->stride_y - task->pad_y;
      to = (stop - 1) * task->stride_y - task->pad_y + (int64_t)(task->kernel_height - 1) * task->dilation_y + 1;
      from = from > 0 ? from : 0, to = to < task->height ? to : task->height;
      break;
    }
    case KIND(rearrange):
      sources = 0;
      for (int32_t i = 0; i < task->taps; i++) {
        int64_t in = call->in_offset + task->offsets[i], out = call->out_offset + task->middles[i];
        REFUSE_IF(in < 0 || in >= arena_size || out < 0 || out >= arena_size, OUT_OF_BOUNDS);
      }
      break;
    case KIND(layer_norm): behind = task->plane == 1 ? 0 : OVER_READ; break;
    case KIND(attention):
      REFUSE_IF((int64_t)task->width + 16 > scratch_size, OUT_OF_BOUNDS);
      REFUSE_IF(!lie_within(arena_size, call->in_offset, sources, task->plane, 0, 1, task->out_width, 0), OUT_OF_BOUNDS);
      REFUSE_IF(!lie_within(arena_size, call->second_offset, sources, task->second_plane, 0, 1, task->pitch, OVER_READ),
                OUT_OF_BOUNDS);
      REFUSE_IF(!lie_within(arena_size, call->third_offset, task->targets, task->third_plane, 0, 1, task->pitch, OVER_READ),
                OUT_OF_BOUNDS);
      REFUSE_IF(!lie_within(arena_size, call->out_offset, task->targets, task->out_plane, 0, 1, task->out_pitch, 0),
                OUT_OF_BOUNDS);
      return 0;
    case KIND(slide):
      REFUSE_IF(!lie_within(arena_size, call->in_offset, task->targets, task->out_plane, first, stop, task->out_pitch, 0),
                OUT_OF_BOUNDS);
      break;
  }
  int64_t in_size = task->outside || task->kind == KIND(spread) ? image_size : arena_size;
  int64_t out_size = task->kind == KIND(gather) ? output_size : arena_size;
  REFUSE_IF(!lie_within(in_size, call->in_offset, sources, task->plane, from, to, task->pitch, behind), OUT_OF_BOUNDS);
  REFUSE_IF(
      !lie_within(arena_size, call->second_offset, task->second_sources, task->second_plane, from, to, task->pitch, behind),
      OUT_OF_BOUNDS);
  REFUSE_IF(!lie_within(out_size, call->out_offset, task->targets, task->out_plane, first, stop, task->out_pitch, behind),
            OUT_OF_BOUNDS);
  return 0;
}

/* Looks at tasks and calls, once before they are run. Sizes are floats of one image, its outputs, an arena and a scratch. */
int32_t dnw_check(const struct task *tasks, int32_t num_tasks, int64_t task_bytes, const struct call *calls, int32_t num_calls,
                  int64_t call_bytes, int64_t image_size, int64_t output_size, int64_t arena_size, int64_t scratch_size) {
  REFUSE_IF(task_bytes != (int64_t)sizeof *tasks || call_bytes != (int64_t)sizeof *calls, OTHER_LAYOUT);
  REFUSE_IF(num_tasks < 0 || num_calls < 0, BAD_SIZE);
  REFUSE_IF(image_size < 0 || output_size < 0 || arena_size < 0 || scratch_size < 0, BAD_SIZE);
  REFUSE_IF((num_tasks > 0 && !tasks) || (num_calls > 0 && !calls), NULL_POINTER);
  for (int32_t i = 0; i < num_tasks; i++) {
    int32_t refused = check_task(tasks + i);
    if (refused) return refused;
  }
  for (int32_t i = 0; i < num_calls; i++) {
    REFUSE_IF(calls[i].task < 0 || calls[i].task >= num_tasks, UNKNOWN_TASK);
    int32_t refused = check_call(tasks + calls[i].task, calls + i, image_size, output_size, arena_size, scratch_size);
    if (refused) return refused;
  }
  return 0;
}

/* Runs calls, which dnw_check has seen, on some images, one after the other, as one of several threads that share an arena and
 * meet after each call. Sizes are floats of one image and of its outputs. */
int32_t dnw_run(const struct task *tasks, const struct call *calls, int32_t num_calls, const float *images, float *outputs,
                float *arena, float *scratch, int64_t num_images, int64_t image_size, int64_t output_size, int32_t thread,
                int32_t threads, int32_t *meeting, int32_t lanes) {
  REFUSE_IF(num_calls < 0 || num_images < 0 || image_size < 0 || output_size < 0, BAD_SIZE);
  REFUSE_IF(thread < 0 || thread >= threads, BAD_SIZE);
  REFUSE_IF(!has_lanes(lanes), UNKNOWN_VECTOR);
  if (num_images == 0 || num_calls == 0) return 0;
  REFUSE_IF(!tasks || !calls || !images || !outputs || !arena || (threads > 1 && !meeting), NULL_POINTER);
  struct context context = {images, outputs, arena, scratch, thread, threads};
  for (int64_t i = 0; i < num_images; i++, context.images += image_size, context.outputs += output_size)
    for (int32_t n = 0; n < num_calls; n++) {
      BY_WIDTH(lanes, run, tasks + calls[n].task, calls + n, &context);
      if (threads > 1) meet(meeting, threads);
    }
  return 0;
}
