// The two inner loops that the streaming kernels share: base + sum_k lambda_k tau_k over a range,
// and the inner products <G, tau_k> over a range.
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
// Deltas whose lanes are kept on the stack at once.
constexpr int64_t kGroup = 32;
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

// Adds <grad, tau_k> over [begin, end) to dots[k].
template <int kDtype, int kExperts>
inline void dot_range(const Source& s, const void* grad, int grad_dtype, double* dots,
                      int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile += kTile) {
    int64_t tile_end = tile + kTile < end ? tile + kTile : end;
    for (int64_t first = 0; first < s.k; first += kGroup) {
      int64_t last = first + kGroup < s.k ? first + kGroup : s.k;
      F32 lanes[kGroup];
      for (int64_t k = first; k < last; ++k) lanes[k - first] = zeros();
      int64_t i = tile;
      for (; i + kLanes <= tile_end; i += kLanes) {
        F32 g = load(grad, i, grad_dtype);
        F32 base = kExperts ? load_base(s, i) : zeros();
        for (int64_t k = first; k < last; ++k) {
          F32 product = g * load_tau<kDtype, kExperts>(s, k, i, base);
          lanes[k - first] = lanes[k - first] + product;
        }
      }
      if (i < tile_end) {
        int64_t n = tile_end - i;
        F32 g = load_first(grad, i, n, grad_dtype);
        F32 base = kExperts ? load_base_first(s, i, n) : zeros();
        for (int64_t k = first; k < last; ++k) {
          F32 product = g * load_tau_first<kDtype, kExperts>(s, k, i, n, base);
          lanes[k - first] = lanes[k - first] + product;
        }
      }
      for (int64_t k = first; k < last; ++k) dots[k] += fold(lanes[k - first]);
    }
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
