/* What KERNELS find for vectors of LANES floats; widths.h includes this once for each width. A kernel is called WIDTH(name) and
 * marked FAST; vec is a vector, and bits what a comparison of two of them gives. */

typedef float WIDTH(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t WIDTH(bits) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define vec WIDTH(vec)
#define bits WIDTH(bits)

/* Every other entry of two vectors, for SHUFFLE. */
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
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

INLINE FAST vec WIDTH(rectified)(vec value) { return (vec)((bits)value & ~(value <= (vec){0})); }
#define rectified WIDTH(rectified)

#include KERNELS

#undef vec
#undef bits
#undef EVEN
#undef ODD
#undef SHUFFLE
#undef rectified
#undef LANES
#undef WIDTH
#undef FAST
