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
enum { BLOCK = 128, GROUPS = 2048 };

int dnw_exchange_version(void) { return 3; }

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
 * equals. Several groups are compared at once, each place with those of its group that are some members further on. m * kernel is
 * at most GROUPS. */
WIDEST void dnw_take_n_of_m(float *restrict held, float *restrict latent, uint8_t *restrict active, int64_t size, int64_t kernel,
                            uint32_t n, uint32_t m, int64_t *restrict taken) {
  uint32_t member[GROUPS], magnitude[GROUPS], before[GROUPS];
  int64_t whole = GROUPS / (m * kernel) * (m * kernel);
  for (int64_t i = 0; i < whole; i++) member[i] = (uint32_t)(i / kernel % m);
  *taken = size;
  for (int64_t start = 0; start < size; start += whole) {
    int64_t length = size - start < whole ? size - start : whole;
    float *in = held + start, *out = latent + start;
    for (int64_t i = 0; i < length; i++) {
      out[i] = in[i];
      magnitude[i] = bits_of(in[i]) & MAGNITUDE;
      before[i] = 0;
    }
    for (uint32_t d = 1; d < m; d++) {
      int64_t step = d * kernel;
      for (int64_t i = 0; i < length - step; i++) before[i] += (magnitude[i] < magnitude[i + step]) & (member[i] + d < m);
      for (int64_t i = step; i < length; i++) before[i] += (magnitude[i - step] >= magnitude[i]) & (member[i] >= d);
    }
    for (int64_t i = 0; i < length; i++) {
      uint32_t is_in = before[i] < n;
      active[start + i] = (uint8_t)is_in;
      in[i] = float_of(bits_of(in[i]) & -is_in);
    }
  }
}

/* A mask, 64 entries to a word, the first in the lowest bit; what is left of the last word is 0. */
void dnw_pack(const uint8_t *mask, int64_t size, uint64_t *words) {
  for (int64_t start = 0; start < size; start += 64) {
    uint64_t word = 0;
    for (int32_t byte = 0; byte < 8; byte++) {
      int64_t left = size - start - 8 * byte;
      uint64_t eight = 0;
      if (left >= 8)
        memcpy(&eight, mask + start + 8 * byte, 8);
      else
        for (int64_t i = 0; i < left; i++) eight |= (uint64_t)mask[start + 8 * byte + i] << (8 * i);
      word |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
    }
    words[start / 64] = word;
  }
}

/* counts = {now, ever, now but not then, then but not now}, of packed masks; what is now has ever been. */
WIDEST void dnw_tally(const uint64_t *now, const uint64_t *then, uint64_t *ever, int64_t words, int64_t *counts) {
  int64_t number = 0, all = 0, entered = 0, left = 0;
  for (int64_t i = 0; i < words; i++) {
    ever[i] |= now[i];
    number += __builtin_popcountll(now[i]), all += __builtin_popcountll(ever[i]);
    entered += __builtin_popcountll(now[i] & ~then[i]), left += __builtin_popcountll(then[i] & ~now[i]);
  }
  counts[0] = number, counts[1] = all, counts[2] = entered, counts[3] = left;
}

/* found = {targets without edges, sources that no target of their group reads}, of a mask [groups, targets, sources, kernel].
 * Seen has room for a row; it is overwritten. */
void dnw_dead(const uint8_t *mask, int64_t groups, int64_t targets, int64_t sources, int64_t kernel, uint8_t *seen, int64_t *found) {
  int64_t row = sources * kernel, dead_targets = 0, dead_sources = 0;
  for (int64_t g = 0; g < groups; g++) {
    int64_t missing = sources;
    memset(seen, 0, (size_t)sources);
    for (int64_t t = 0; t < targets; t++, mask += row) {
      const uint8_t *first = memchr(mask, 1, (size_t)row);
      dead_targets += first == 0;
      if (first == 0 || missing == 0) continue;
      for (int64_t i = first - mask; i < row; i++) {
        if (!mask[i] || seen[i / kernel]) continue;
        seen[i / kernel] = 1;
        missing--;
      }
    }
    dead_sources += missing;
  }
  found[0] = dead_targets, found[1] = dead_sources;
}
