// The inner loops that the streaming kernels share: base + sum_k lambda_k tau_k over a range, the
// inner products <G, tau_k> over a range, and both at once.
//
// Both read tensors through Source. Additions go in order of k. Products of a range of at most
// kTile elements are summed in sixteen fp32 lanes and then folded into fp64.
#pragma once

#include "fastmerge/cpu.h"
#include "types.h"
#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

// Elements between two folds into fp64; small enough that the tiles of ten streams stay in the
// first-level cache.
constexpr int64_t kTile = 512;
// Vectors handled together, so that reading a pointer and a coefficient is shared among them.
constexpr int kStrip = kParts == 4 ? 1 : 4 / kParts;

FASTMERGE_INLINE F32 load_base(const Source& s, int64_t i) {
  return s.base == nullptr ? zeros() : load(s.base, i, s.base_dtype);
}

FASTMERGE_INLINE F32 load_base_first(const Source& s, int64_t i, int64_t n) {
  return s.base == nullptr ? zeros() : load_first(s.base, i, n, s.base_dtype);
}

template <int kDtype, int kExperts>
FASTMERGE_INLINE F32 load_tau(const Source& s, int64_t k, int64_t i, F32 base) {
  F32 delta = load<kDtype>(s.deltas[k], i);
  return kExperts ? delta - base : delta;
}

template <int kDtype, int kExperts>
FASTMERGE_INLINE F32 load_tau_first(const Source& s, int64_t k, int64_t i, int64_t n, F32 base) {
  F32 delta = load_first<kDtype>(s.deltas[k], i, n);
  return kExperts ? delta - base : delta;
}

template <int kDtype, int kExperts>
inline void combine_range(const Source& s, const float* coefficients, void* out, int out_dtype,
                          int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kStrip * kLanes <= end; i += kStrip * kLanes) {
    F32 base[kStrip], sum[kStrip];
    for (int v = 0; v < kStrip; ++v) sum[v] = base[v] = load_base(s, i + v * kLanes);
    for (int64_t k = 0; k < s.k; ++k) {
      F32 coefficient = broadcast(coefficients[k]);
      for (int v = 0; v < kStrip; ++v) {
        sum[v] = sum[v] + coefficient * load_tau<kDtype, kExperts>(s, k, i + v * kLanes, base[v]);
      }
    }
    for (int v = 0; v < kStrip; ++v) store(out, i + v * kLanes, sum[v], out_dtype);
  }
  for (; i < end; i += kLanes) {
    int64_t n = end - i < kLanes ? end - i : kLanes;
    F32 base = load_base_first(s, i, n);
    F32 sum = base;
    for (int64_t k = 0; k < s.k; ++k) {
      F32 tau = load_tau_first<kDtype, kExperts>(s, k, i, n, base);
      sum = sum + broadcast(coefficients[k]) * tau;
    }
    store_first(out, i, sum, n, out_dtype);
  }
}

// What a tile is multiplied with, and where its sums go if it is combined as well.
struct TileTarget {
  const void* grad;
  int grad_dtype;
  double* dots;               // [K], added to
  const float* coefficients;  // [K]
  void* out;
  int out_dtype;
};

// One group of deltas over one tile, their lanes in registers: adds <grad, tau_k> to dots[k] and,
// with kCombine, lambda_k tau_k to the sums, which wait in `sums` until the last group.
template <int kDtype, int kExperts, int kCombine, int kCount>
inline void tile_group(const Source& s, const TileTarget& t, int64_t first, float* sums,
                       int64_t begin, int64_t end) {
  const void* deltas[kCount];
  F32 lanes[kCount], lambda[kCount];
  for (int j = 0; j < kCount; ++j) {
    deltas[j] = s.deltas[first + j];
    lanes[j] = zeros();
    if (kCombine) lambda[j] = broadcast(t.coefficients[first + j]);
  }
  bool last = first + kCount == s.k;
  auto vector = [&](int64_t i, F32 g, F32 base, auto load_delta, auto store_sum) {
    F32 sum = base;
    if (kCombine && first > 0) memcpy(&sum, sums + (i - begin), sizeof(sum));
    _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) {
      F32 tau = load_delta(deltas[j]);
      if (kExperts) tau = tau - base;
      if (kCombine) sum = sum + lambda[j] * tau;
      lanes[j] = lanes[j] + g * tau;
    }
    if (kCombine && last) store_sum(sum);
    if (kCombine && !last) memcpy(sums + (i - begin), &sum, sizeof(sum));
  };
  constexpr bool kBase = kExperts || kCombine;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    vector(
        i, load(t.grad, i, t.grad_dtype), kBase ? load_base(s, i) : zeros(),
        [&](const void* delta) { return load<kDtype>(delta, i); },
        [&](F32 sum) { store(t.out, i, sum, t.out_dtype); });
  }
  if (i < end) {
    int64_t n = end - i;
    vector(
        i, load_first(t.grad, i, n, t.grad_dtype), kBase ? load_base_first(s, i, n) : zeros(),
        [&](const void* delta) { return load_first<kDtype>(delta, i, n); },
        [&](F32 sum) { store_first(t.out, i, sum, n, t.out_dtype); });
  }
  for (int j = 0; j < kCount; ++j) t.dots[first + j] += fold(lanes[j]);
}

// Adds <grad, tau_k> over a tile of at most kTile elements to dots[k]; with kCombine also stores
// base + sum_k lambda_k tau_k, with the additions of combine_range. Each delta is read once.
template <int kDtype, int kExperts, int kCombine>
inline void dot_tile(const Source& s, const TileTarget& t, int64_t begin, int64_t end) {
  float sums[kTile];
  for (int64_t k = 0; k < s.k;) {
    int64_t left = s.k - k;
    if (left >= 8) {
      tile_group<kDtype, kExperts, kCombine, 8>(s, t, k, sums, begin, end);
      k += 8;
    } else if (left >= 4) {
      tile_group<kDtype, kExperts, kCombine, 4>(s, t, k, sums, begin, end);
      k += 4;
    } else if (left >= 2) {
      tile_group<kDtype, kExperts, kCombine, 2>(s, t, k, sums, begin, end);
      k += 2;
    } else {
      tile_group<kDtype, kExperts, kCombine, 1>(s, t, k, sums, begin, end);
      k += 1;
    }
  }
}

// dot_tile over all tiles of [begin, end).
template <int kDtype, int kExperts, int kCombine>
inline void dot_range(const Source& s, const TileTarget& t, int64_t begin, int64_t end) {
  if (kCombine && s.k == 0) {
    return combine_range<kDtype, kExperts>(s, t.coefficients, t.out, t.out_dtype, begin, end);
  }
  for (int64_t tile = begin; tile < end; tile += kTile) {
    int64_t tile_end = tile + kTile < end ? tile + kTile : end;
    dot_tile<kDtype, kExperts, kCombine>(s, t, tile, tile_end);
  }
}

// dots[k] = sum over blocks, in order, of partials[block, k].
inline void sum_partials(const double* partials, int64_t blocks, int64_t k_count, double* dots) {
  for (int64_t k = 0; k < k_count; ++k) dots[k] = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t k = 0; k < k_count; ++k) dots[k] += partials[b * k_count + k];
  }
  for (int64_t k = 0; k < k_count; ++k) dots[k] = canonical_nan(dots[k]);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
