/* What surrounds an optimizer's step, in one pass over the memory of a float32 parameter. exchange.py says what is called when.
 *
 * Contract: no Python, no torch, no allocation, no globals: any number of threads may work on different parameters, or on
 * different parts of one. What is passed in has been checked by the caller. Plain C, of which GCC and Clang make vectors.
 */

#include <stdint.h>
#include <string.h>

/* One copy of a function for each vector width that a machine may have; the loader takes the widest. */
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

#define MAGNITUDE 0x7fffffffu
#define INFINITE 0x7f800000u
enum { BLOCK = 128 };

int dnw_exchange_version(void) { return 1; }

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* out = values where the mask holds, else 0. Returns whether all of out is finite. */
WIDEST int32_t dnw_masked(const float *restrict values, const uint8_t *restrict mask, float *restrict out, int64_t size) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; i++) {
    uint32_t bits = bits_of(values[i]) & -(uint32_t)(mask[i] != 0), magnitude = bits & MAGNITUDE;
    out[i] = float_of(bits);
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest < INFINITE;
}

/* Whether all values are finite. */
WIDEST int32_t dnw_finite(const float *values, int64_t size) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; i++) {
    uint32_t magnitude = bits_of(values[i]) & MAGNITUDE;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest < INFINITE;
}

/* Makes what the parameter holds the latent weights. Candidates of at least the magnitude low become active, the others 0 in the
 * parameter. Counts those above high; the places of those between go into places, as far as there is room.
 * found = {above, between}; taken is set to size before anything is lost. */
WIDEST void dnw_take(float *restrict held, float *restrict latent, uint8_t *restrict active, const uint8_t *restrict candidates,
                     int64_t size, uint32_t low, uint32_t high, int64_t *restrict places, int64_t room,
                     int64_t *restrict found, int64_t *restrict taken) {
  int64_t above = 0, between = 0;
  *taken = size;
  for (int64_t start = 0; start < size; start += BLOCK) {
    int64_t length = size - start < BLOCK ? size - start : BLOCK;
    float *in = held + start, *out = latent + start;
    uint8_t *chosen = active + start;
    const uint8_t *may = candidates ? candidates + start : 0;
    uint32_t many = 0, over = 0;
    if (may)
      for (int64_t i = 0; i < length; i++) {
        uint32_t bits = bits_of(in[i]), magnitude = bits & MAGNITUDE, allowed = may[i] != 0;
        uint32_t is_in = (magnitude >= low) & allowed, is_over = (magnitude > high) & allowed;
        out[i] = float_of(bits);
        chosen[i] = (uint8_t)is_in;
        in[i] = float_of(bits & -is_in);
        many += is_in, over += is_over;
      }
    else
      for (int64_t i = 0; i < length; i++) {
        uint32_t bits = bits_of(in[i]), magnitude = bits & MAGNITUDE;
        uint32_t is_in = magnitude >= low, is_over = magnitude > high;
        out[i] = float_of(bits);
        chosen[i] = (uint8_t)is_in;
        in[i] = float_of(bits & -is_in);
        many += is_in, over += is_over;
      }
    above += over;
    if (many == over) continue;
    for (int64_t i = 0; i < length; i++)
      if (chosen[i] && (bits_of(out[i]) & MAGNITUDE) <= high) {
        if (between < room) places[between] = start + i;
        between++;
      }
  }
  found[0] = above, found[1] = between;
}

/* The same where n of every m sources of a target are active: held is [targets, groups, m, kernel], the lowest index first among
 * equals. */
WIDEST void dnw_take_n_of_m(float *restrict held, float *restrict latent, uint8_t *restrict active, int64_t groups, int64_t kernel,
                            int32_t n, int32_t m, int64_t *restrict taken) {
  *taken = groups * m * kernel;
  memcpy(latent, held, sizeof(float) * (size_t)(groups * m * kernel));
  for (int64_t g = 0; g < groups; g++) {
    const float *in = latent + g * m * kernel;
    float *out = held + g * m * kernel;
    uint8_t *chosen = active + g * m * kernel;
    for (int64_t k = 0; k < kernel; k++)
      for (int32_t i = 0; i < m; i++) {
        uint32_t mine = bits_of(in[i * kernel + k]) & MAGNITUDE;
        int32_t before = 0;
        for (int32_t j = 0; j < m; j++) {
          uint32_t other = bits_of(in[j * kernel + k]) & MAGNITUDE;
          before += other > mine || (other == mine && j < i);
        }
        chosen[i * kernel + k] = before < n;
        out[i * kernel + k] = before < n ? in[i * kernel + k] : 0.0f;
      }
  }
}
