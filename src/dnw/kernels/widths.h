/* Compiles KERNELS, a file named from this folder, once for each width of vectors that a machine may have; vector.h says what
 * they find there. What they need of the source that includes this stands before it. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#define LANES 4
#define WIDTH(name) name##_4
#define FAST
#include "vector.h"

#ifdef __x86_64__
#define LANES 8
#define WIDTH(name) name##_8
#define FAST __attribute__((target("avx2,fma")))
#include "vector.h"

#define LANES 16
#define WIDTH(name) name##_16
#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "vector.h"

#define BY_WIDTH(lanes, name, ...) \
  switch (lanes) { \
    case 16: name##_16(__VA_ARGS__); break; \
    case 8: name##_8(__VA_ARGS__); break; \
    default: name##_4(__VA_ARGS__); \
  }
#else
#define BY_WIDTH(lanes, name, ...) name##_4(__VA_ARGS__)
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

static int has_lanes(int32_t lanes) { return lanes == 4 || ((lanes == 8 || lanes == 16) && lanes <= dnw_lanes()); }
