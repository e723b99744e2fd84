// Counter-based random bits: Philox4x32-10 (Salmon et al., SC 2011) on eight counters at once.
//
// Entries come in groups of 64, halves of 16 bits from eight counters: entry e of a tensor takes
// counter (e / 64) * 8 + (e % 32) / 4, there word (e / 32) % 2 * 2 + (e % 4) / 2, of that the low
// half if e is even, else the high one. So a bit depends on key, expert and entry index only.
#pragma once

#include <stdint.h>

#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

constexpr int kGroupEntries = 64;
// Groups drawn together: a round has to wait for its multiplications.
constexpr int kWays = 4;

typedef uint64_t Counters __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));

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
FASTMERGE_INLINE uint32_t lane_bits(Halves mask) {
#if defined(__AVX512F__)
  return _mm512_movepi16_mask((__m512i)mask);
#elif defined(__AVX2__)
  __m256i part[2];
  memcpy(part, &mask, sizeof(mask));
  __m256i bytes = _mm256_packs_epi16(part[0], part[1]);
  return uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
#else
  uint32_t r = 0;
  for (int lane = 0; lane < 32; ++lane) r |= (mask[lane] & 1u) << lane;
  return r;
#endif
}

// The 16-bit halves of `groups` groups from `group` on in the order of their entries; `low` gives
// the 16 bits below them, which decide when a comparison of the first halves comes out equal.
template <int kGroups>
FASTMERGE_INLINE void random_halves(uint64_t key, uint32_t expert, bool low, uint64_t group,
                                    Halves (&halves)[2 * kGroups]) {
  const Counters lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Counters c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = (group + uint64_t(g)) * 8 + lane;
    c1[g] = c0[g] >> 32;
    c2[g] = Counters{} + expert;
    c3[g] = Counters{} + (low ? 1u : 0u);
  }
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      Counters p0 = multiply_low(c0[g], 0xD2511F53u), p1 = multiply_low(c2[g], 0xCD9E8D57u);
      c0[g] = (p1 >> 32) ^ c1[g] ^ k0;
      c2[g] = (p0 >> 32) ^ c3[g] ^ k1;
      c1[g] = p1;
      c3[g] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int g = 0; g < kGroups; ++g) {
    halves[2 * g] = (Halves)((c0[g] & 0xffffffffu) | (c1[g] << 32));
    halves[2 * g + 1] = (Halves)((c2[g] & 0xffffffffu) | (c3[g] << 32));
  }
}

// Sets bit e % 64 of words[e / 64] where the 32-bit draw of entry e of the groups is below
// `threshold` <= 2^32.
template <int kGroups>
FASTMERGE_INLINE void draws_below(uint64_t key, uint32_t expert, uint64_t group, uint64_t threshold,
                                  uint64_t (&words)[kGroups]) {
  if (threshold >> 32) {
    for (uint64_t& word : words) word = ~uint64_t(0);
    return;
  }
  const Halves high = Halves{} + uint16_t(threshold >> 16);
  const Halves low = Halves{} + uint16_t(threshold);
  Halves draws[2 * kGroups];
  random_halves<kGroups>(key, expert, false, group, draws);
  uint64_t equal[kGroups], any = 0;
  for (int g = 0; g < kGroups; ++g) {
    words[g] = lane_bits((Halves)(draws[2 * g] < high)) |
               uint64_t(lane_bits((Halves)(draws[2 * g + 1] < high))) << 32;
    equal[g] = lane_bits((Halves)(draws[2 * g] == high)) |
               uint64_t(lane_bits((Halves)(draws[2 * g + 1] == high))) << 32;
    any |= equal[g];
  }
  if (any == 0) return;
  random_halves<kGroups>(key, expert, true, group, draws);
  for (int g = 0; g < kGroups; ++g) {
    words[g] |= equal[g] & (lane_bits((Halves)(draws[2 * g] < low)) |
                            uint64_t(lane_bits((Halves)(draws[2 * g + 1] < low))) << 32);
  }
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
