// Entries of a relaxed mask, m = sigmoid((logit + noise) / temperature), made where they are used.
#pragma once

#include "combine.h"
#include "exponential.h"
#include "parallel.h"
#include "philox.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

// Entries drawn for a tile that begins anywhere in a group.
constexpr int64_t kTileDraws = kTile + kWays * kGroupEntries;

FASTMERGE_INLINE F32 widen_halves(const uint16_t* halves) {
  F32 r;
  FASTMERGE_PARTS {
    PartH half;
    memcpy(&half, halves + j * kWidth, sizeof(half));
    r.part[j] = __builtin_convertvector((PartI)widen(half), PartF);
  }
  return r;
}

// log(u / (1 - u)) of u = (draw + 1/2) / 2^32, from the draws' halves. Both terms of the quotient
// are rounded once.
FASTMERGE_INLINE F32 logistic_noise(const uint16_t* high, const uint16_t* low) {
  F32 h = widen_halves(high), l = widen_halves(low);
  F32 above = h * broadcast(65536.0f) + (l + broadcast(0.5f));
  F32 below = (broadcast(65535.0f) - h) * broadcast(65536.0f) + (broadcast(65535.5f) - l);
  return log_positive(above / below);
}

// Fills values[i] = m and slopes[i] = dm/dlogit, i < n <= kTile, of the entries from `begin` on;
// both have room for kTile entries.
inline void mask_tile(const RelaxedMask& mask, int64_t begin, int64_t n, float* values,
                      float* slopes) {
  uint16_t high[kTileDraws], low[kTileDraws];
  int64_t skip = 0;
  if (mask.noisy) {
    uint64_t index = uint64_t(mask.offset + begin), group = index / kGroupEntries;
    skip = int64_t(index % kGroupEntries);
    for (int64_t d = 0; d < skip + n; d += kWays * kGroupEntries) {
      Halves halves[2 * kWays];
      random_halves<kWays>(mask.key, 0, false, group + uint64_t(d) / kGroupEntries, halves);
      memcpy(high + d, halves, sizeof(halves));
      random_halves<kWays>(mask.key, 0, true, group + uint64_t(d) / kGroupEntries, halves);
      memcpy(low + d, halves, sizeof(halves));
    }
  }
  F32 one = broadcast(1.0f), most = broadcast(87.0f), steepness = broadcast(mask.steepness);
  for (int64_t i = 0; i < n; i += kLanes) {
    F32 x = n - i < kLanes ? load_first<kFloat32>(mask.logits, begin + i, n - i)
                           : load<kFloat32>(mask.logits, begin + i);
    if (mask.noisy) x = x + logistic_noise(high + skip + i, low + skip + i);
    F32 value, slope;
    if (mask.steepness == 0.0f) {
      value = select(x > zeros(), one, select(x == x, zeros(), x));
      slope = zeros();
    } else {
      F32 falling = zeros() - x * steepness;
      F32 e = exp_clamped(clamp_low(select(falling > most, most, falling)));
      value = one / (one + e);
      slope = value * (value * e) * steepness;
    }
    memcpy(values + i, &value, sizeof(value));
    memcpy(slopes + i, &slope, sizeof(slope));
  }
}

// Calls body(block, begin, n, values, slopes) for the tiles of every block, those of one block in
// order.
template <class Body>
inline void for_each_mask_tile(const RelaxedMask& mask, int64_t size, int threads, Body body) {
  parallel_runs(block_count(size), team_size(size, threads), [&](int64_t first, int64_t last) {
    float values[kTile], slopes[kTile];
    for (int64_t b = first; b < last; ++b) {
      int64_t end = (b + 1) * kBlock < size ? (b + 1) * kBlock : size;
      for (int64_t tile = b * kBlock; tile < end; tile += kTile) {
        int64_t n = end - tile < kTile ? end - tile : kTile;
        mask_tile(mask, tile, n, values, slopes);
        body(b, tile, n, values, slopes);
      }
    }
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
