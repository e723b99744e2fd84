// base + sum_k lambda_k m tau_k with a relaxed mask m that is made on the way, or its gradient, or
// both of one panel.
//
// Contiguous tensors. Additions go in the order of k; a mask of ones gives the bytes of
// weighted_sum. Products of a tile are summed in sixteen fp32 lanes and folded into fp64.
#include "kernels.h"
#include "relaxed_mask.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// One tile, with what waits there between two groups of deltas.
struct Tile {
  int64_t begin;
  int64_t n;
  const float* values;
  const float* slopes;
  float* sums;      // base + sum_k lambda_k m tau_k
  float* products;  // sum_k lambda_k tau_k
  double* dots;     // [K], added to
};

FASTMERGE_INLINE F32 read(const void* data, int64_t i, int64_t n, int dtype) {
  return n < kLanes ? load_first(data, i, n, dtype) : load(data, i, dtype);
}

template <int kDtype, int kExperts, int kOut, int kGrad, int kCount>
inline void combine_group(const ConcreteCombineParams& p, const Tile& t, int64_t first) {
  const Source& s = p.source;
  F32 lanes[kCount], lambda[kCount];
  for (int j = 0; j < kCount; ++j) {
    lanes[j] = zeros();
    lambda[j] = broadcast(p.coefficients[first + j]);
  }
  bool last = first + kCount == s.k;
  for (int64_t at = 0; at < t.n; at += kLanes) {
    int64_t i = t.begin + at, n = t.n - at < kLanes ? t.n - at : kLanes;
    F32 base = kExperts || kOut ? read(s.base, i, n, s.base_dtype) : zeros();
    F32 value = load<kFloat32>(t.values, at);
    F32 sum = first > 0 ? load<kFloat32>(t.sums, at) : base;
    F32 product = first > 0 ? load<kFloat32>(t.products, at) : zeros();
    F32 grad = kGrad ? read(p.grad, i, n, p.grad_dtype) : zeros();
    F32 masked = grad * value;
    _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) {
      const void* delta = s.deltas[first + j];
      F32 tau = n < kLanes ? load_first<kDtype>(delta, i, n) : load<kDtype>(delta, i);
      if (kExperts) tau = tau - base;
      if (kOut) sum = sum + (lambda[j] * value) * tau;
      if (kGrad) product = product + lambda[j] * tau;
      if (kGrad) lanes[j] = lanes[j] + masked * tau;
    }
    if (!last) {
      memcpy(t.sums + at, &sum, sizeof(sum));
      memcpy(t.products + at, &product, sizeof(product));
      continue;
    }
    if (kGrad) product = grad * product * load<kFloat32>(t.slopes, at);
    if (n < kLanes) {
      if (kOut) store_first(p.out, i, sum, n, p.out_dtype);
      if (kGrad && p.grad_logits != nullptr) {
        store_first<kFloat32>(p.grad_logits, i, product, n);
      }
    } else {
      if (kOut) store(p.out, i, sum, p.out_dtype);
      if (kGrad && p.grad_logits != nullptr) store<kFloat32>(p.grad_logits, i, product);
    }
  }
  if (!kGrad) return;
  for (int j = 0; j < kCount; ++j) t.dots[first + j] += fold(lanes[j]);
}

template <int kDtype, int kExperts, int kOut, int kGrad>
void combine(const ConcreteCombineParams& p) {
  for_each_mask_tile(
      p.mask, p.size, p.threads,
      [&](int64_t b, int64_t begin, int64_t n, const float* values, const float* slopes) {
        float sums[kTile], products[kTile];
        double* dots = kGrad ? p.scratch + b * p.source.k : nullptr;
        if (kGrad && begin % kBlock == 0) {
          for (int64_t k = 0; k < p.source.k; ++k) dots[k] = 0.0;
        }
        Tile tile = {begin, n, values, slopes, sums, products, dots};
        int64_t k = 0;
        for (; p.source.k - k >= 8; k += 8) {
          combine_group<kDtype, kExperts, kOut, kGrad, 8>(p, tile, k);
        }
        for (; p.source.k - k >= 2; k += 2) {
          combine_group<kDtype, kExperts, kOut, kGrad, 2>(p, tile, k);
        }
        if (k < p.source.k) {
          combine_group<kDtype, kExperts, kOut, kGrad, 1>(p, tile, k);
        }
      });
  if (kGrad) sum_partials(p.scratch, block_count(p.size), p.source.k, p.dots);
}

}  // namespace

void concrete_combine(const ConcreteCombineParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    if (p.grad == nullptr) return combine<kDtype, kExperts, 1, 0>(p);
    if (p.out == nullptr) return combine<kDtype, kExperts, 0, 1>(p);
    combine<kDtype, kExperts, 1, 1>(p);
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
