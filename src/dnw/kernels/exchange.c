/* What surrounds an optimizer's step, in one pass over the memory of a float32 parameter. _exchange.py calls it.
 *
 * Contract: no Python, no torch, no allocation, no globals: any number of threads may work on different parameters, or on
 * different parts of one. Each function looks at its sizes and pointers, and returns a negative number where it does not take
 * them (errors.h); that so much memory is there is for the caller to see to. Plain C, of which GCC and Clang make vectors. */

#include <stdint.h>
#include <string.h>

#include "errors.h"

/* One copy of a function for each vector width that a machine may have; the loader takes the widest. */
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

#define MAGNITUDE 0x7fffffffu
#define INFINITE 0x7f800000u
enum { BLOCK = 128, GROUPS = 2048 };

int32_t dnw_version(void) { return 4; }

/* How many entries dnw_take_n_of_m compares at once: the most that m * kernel may be. */
int32_t dnw_groups(void) { return GROUPS; }

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
  REFUSE_IF(size < 0, BAD_SIZE);
  REFUSE_IF(size > 0 && (!values || !mask || !out), NULL_POINTER);
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
  REFUSE_IF(size < 0, BAD_SIZE);
  REFUSE_IF(size > 0 && !values, NULL_POINTER);
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; i++) {
    uint32_t magnitude = bits_of(values[i]) & MAGNITUDE;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest < INFINITE;
}

/* Makes what the parameter holds the latent weights. Candidates of at least the magnitude low become active, the others 0 in
 * the parameter. Counts those above high; the indices of those between go into indices, as far as there is room.
 * found = {above, between}; taken is set to size before anything is lost. */
WIDEST int32_t dnw_take(float *restrict held, float *restrict latent, uint8_t *restrict active,
                        const uint8_t *restrict candidates, int64_t size, uint32_t low, uint32_t high,
                        int64_t *restrict indices, int64_t room, int64_t *restrict found, int64_t *restrict taken) {
  REFUSE_IF(size < 0 || room < 0, BAD_SIZE);
  REFUSE_IF(!found || !taken || (room > 0 && !indices) || (size > 0 && (!held || !latent || !active)), NULL_POINTER);
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
        if (between < room) indices[between] = start + i;
        between++;
      }
  }
  found[0] = above, found[1] = between;
  return 0;
}

/* The same where n of every m sources of a target are active: held is [targets, groups, m, kernel], the lowest index first
 * among equals. Several groups are compared at once, each entry with those of its group that are some members further on.
 * m * kernel is at most GROUPS. */
WIDEST int32_t dnw_take_n_of_m(float *restrict held, float *restrict latent, uint8_t *restrict active, int64_t size,
                               int64_t kernel, uint32_t n, uint32_t m, int64_t *restrict taken) {
  REFUSE_IF(size < 0 || kernel < 1 || kernel > GROUPS || m < 1 || m > GROUPS || m * kernel > GROUPS || n > m, BAD_SIZE);
  REFUSE_IF(size % (m * kernel), BAD_SIZE);
  REFUSE_IF(!taken || (size > 0 && (!held || !latent || !active)), NULL_POINTER);
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
      int64_t apart = d * kernel;
      for (int64_t i = 0; i < length - apart; i++) before[i] += (magnitude[i] < magnitude[i + apart]) & (member[i] + d < m);
      for (int64_t i = apart; i < length; i++) before[i] += (magnitude[i - apart] >= magnitude[i]) & (member[i] >= d);
    }
    for (int64_t i = 0; i < length; i++) {
      uint32_t is_in = before[i] < n;
      active[start + i] = (uint8_t)is_in;
      in[i] = float_of(bits_of(in[i]) & -is_in);
    }
  }
  return 0;
}

/* A mask, 64 entries to a word, the first in the lowest bit; what is left of the last word is 0. */
int32_t dnw_pack(const uint8_t *mask, int64_t size, uint64_t *words) {
  REFUSE_IF(size < 0, BAD_SIZE);
  REFUSE_IF(size > 0 && (!mask || !words), NULL_POINTER);
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
  return 0;
}

/* counts = {now, ever, now but not then, then but not now}, of packed masks; what is now has ever been. */
WIDEST int32_t dnw_tally(const uint64_t *now, const uint64_t *then, uint64_t *ever, int64_t num_words, int64_t *counts) {
  REFUSE_IF(num_words < 0, BAD_SIZE);
  REFUSE_IF(!counts || (num_words > 0 && (!now || !then || !ever)), NULL_POINTER);
  int64_t number = 0, all = 0, entered = 0, left = 0;
  for (int64_t i = 0; i < num_words; i++) {
    ever[i] |= now[i];
    number += __builtin_popcountll(now[i]), all += __builtin_popcountll(ever[i]);
    entered += __builtin_popcountll(now[i] & ~then[i]), left += __builtin_popcountll(then[i] & ~now[i]);
  }
  counts[0] = number, counts[1] = all, counts[2] = entered, counts[3] = left;
  return 0;
}

/* found = {targets without edges, sources that no target of their group reads}, of a mask [groups, targets, sources, kernel].
 * Seen has room for a row; it is overwritten. */
int32_t dnw_dead(const uint8_t *mask, int64_t groups, int64_t targets, int64_t sources, int64_t kernel, uint8_t *seen,
                 int64_t *found) {
  REFUSE_IF(groups < 0 || targets < 0 || sources < 0 || kernel < 0, BAD_SIZE);
  REFUSE_IF(!found || (sources > 0 && (!seen || (kernel > 0 && !mask))), NULL_POINTER);
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
  return 0;
}
