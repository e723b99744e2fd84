// Counter-based random bits: Philox4x32-10 (Salmon et al., SC 2011) on eight counters at once.
//
// Entries come in groups of 64 = eight halves of 16 bits from each of eight counters: entry e of a
// tensor takes counter (e / 64) * 8 + e % 8 and half (e / 8) % 8, the low half of a word first. So
// a bit depends on key, expert and absolute entry index only.
#pragma once

#include <stdint.h>

#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

constexpr int kGroupEntries = 64;
typedef uint64_t Counters __attribute__((vector_size(64)));

// Products of the low 32 bits of every lane; higher bits are ignored.
FASTMERGE_INLINE Counters multiply_low(Counters a, uint64_t b) {
  Counters r;
#if defined(__AVX512F__)
  r = (Counters)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(int64_t(b)));
#elif defined(__AVX2__)
  __m256i part[2];
  memcpy(part, &a, sizeof(a));
  for (__m256i& p : part) p = _mm256_mul_epu32(p, _mm256_set1_epi64x(int64_t(b)));
  memcpy(&r, part, sizeof(r));
#else
  r = (a & 0xffffffffu) * b;
#endif
  return r;
}

// One bit per lane, the first lane lowest.
FASTMERGE_INLINE uint64_t lane_bits(Counters mask) {
#if defined(__AVX512F__)
  return uint8_t(_mm512_movepi64_mask((__m512i)mask));
#else
  uint64_t r = 0;
  for (int lane = 0; lane < 8; ++lane) r |= (mask[lane] & 1u) << lane;
  return r;
#endif
}

struct RandomHalves {
  Counters half[8];
};

// The 512 bits of a group's eight counters as halves; `low` gives the 16 bits below them, which
// decide when a comparison of the first halves comes out equal.
FASTMERGE_INLINE RandomHalves random_halves(uint64_t key, uint32_t expert, bool low,
                                            uint64_t group) {
  const Counters lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Counters first = (group * 8 + lane);
  Counters c0 = first, c1 = first >> 32, c2 = Counters{} + expert,
           c3 = Counters{} + (low ? 1u : 0u);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Counters p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Counters word[4] = {c0, c1, c2, c3};
  RandomHalves r;
  for (int j = 0; j < 4; ++j) {
    r.half[2 * j] = word[j] & 0xffffu;
    r.half[2 * j + 1] = (word[j] >> 16) & 0xffffu;
  }
  return r;
}

// Bit e set where the 32-bit draw of entry e of the group is below `threshold` <= 2^32.
FASTMERGE_INLINE uint64_t draws_below(uint64_t key, uint32_t expert, uint64_t group,
                                      uint64_t threshold) {
  uint64_t high = threshold >> 16, low = threshold & 0xffffu;
  RandomHalves draws = random_halves(key, expert, false, group);
  uint64_t below = 0, equal = 0;
  for (int j = 0; j < 8; ++j) {
    below |= lane_bits((Counters)(draws.half[j] < high)) << (8 * j);
    equal |= lane_bits((Counters)(draws.half[j] == high)) << (8 * j);
  }
  if (low == 0 || equal == 0) return below;
  draws = random_halves(key, expert, true, group);
  for (int j = 0; j < 8; ++j) {
    below |= (lane_bits((Counters)(draws.half[j] < low)) << (8 * j)) & equal;
  }
  return below;
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
