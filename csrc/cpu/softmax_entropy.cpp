// Row entropy of a softmax and its gradient, without storing probabilities.
//
// Rows have unit element stride and any row stride; outputs are overwritten. Row sums are fp32
// lanes over a tile, folded into fp64. A logit of -inf has probability zero; NaN and +inf give NaN,
// as does a row of nothing but -inf.
#include "combine.h"
#include "exponential.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// log(z) for normal z > 0: z = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh f.
double log_normal(double z) {
  if (z != z) return z;
  uint64_t u;
  memcpy(&u, &z, sizeof(u));
  // Moves the mantissa's interval from [1, 2) to [sqrt(1/2), sqrt(2)).
  uint64_t shifted = u + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
  int64_t exponent = int64_t(shifted >> 52) - 1023;
  u -= uint64_t(exponent) << 52;
  double m;
  memcpy(&m, &u, sizeof(m));
  double f = (m - 1.0) / (m + 1.0), square = f * f, series = 0.0;
  for (int term = 23; term >= 1; term -= 2) series = series * square + 1.0 / term;
  return double(exponent) * 0x1.62e42fefa39efp-1 + 2.0 * f * series;
}

// The first n lanes of a row's logits; the others as if they were -inf.
template <int kDtype>
FASTMERGE_INLINE F32 load_logits(const void* row, int64_t i, int64_t n) {
  if (n == kLanes) return load<kDtype>(row, i);
  float lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = j < n ? 0.0f : -__builtin_inff();
  return load_first<kDtype>(row, i, n) + load<kFloat32>(lane, 0);
}

template <int kDtype>
float row_max(const void* row, int64_t cols) {
  F32 best = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < cols; i += kLanes) {
    F32 x = load_logits<kDtype>(row, i, cols - i < kLanes ? cols - i : kLanes);
    best = select(x > best, x, best);
  }
  float lane[kLanes];
  memcpy(lane, &best, sizeof(lane));
  for (int j = 1; j < kLanes; ++j) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return lane[0];
}

template <int kDtype>
void entropy_row(const void* row, int64_t cols, float* entropy, float* lse) {
  float largest = row_max<kDtype>(row, cols);
  double total = 0.0, weighted = 0.0;  // sums of e and of e * (x - largest), e = exp(x - largest)
  for (int64_t tile = 0; tile < cols; tile += kTile) {
    int64_t end = tile + kTile < cols ? tile + kTile : cols;
    F32 tile_total = zeros(), tile_weighted = zeros();
    for (int64_t i = tile; i < end; i += kLanes) {
      F32 x = load_logits<kDtype>(row, i, end - i < kLanes ? end - i : kLanes);
      F32 shifted = clamp_low(x - broadcast(largest));
      F32 e = exp_clamped(shifted);
      tile_total = tile_total + e;
      tile_weighted = tile_weighted + e * shifted;
    }
    total += fold(tile_total);
    weighted += fold(tile_weighted);
  }
  double log_total = log_normal(total);
  *entropy = float(canonical_nan(log_total - weighted / total));
  *lse = float(canonical_nan(double(largest) + log_total));
}

template <int kDtype>
void backward_row(const void* row, int64_t cols, float entropy, float lse, float grad, void* out) {
  for (int64_t i = 0; i < cols; i += kLanes) {
    int64_t n = cols - i < kLanes ? cols - i : kLanes;
    F32 x = n == kLanes ? load<kDtype>(row, i) : load_first<kDtype>(row, i, n);
    F32 log_p = clamp_low(x - broadcast(lse));
    F32 p = exp_clamped(log_p);
    F32 slope = (zeros() - p * (log_p + broadcast(entropy))) * broadcast(grad);
    slope = select(p == zeros(), zeros(), slope);
    if (n == kLanes) {
      store<kDtype>(out, i, slope);
    } else {
      store_first<kDtype>(out, i, slope, n);
    }
  }
}

}  // namespace

void softmax_entropy(const SoftmaxEntropyParams& p) {
  with_dtype(p.dtype, [&](auto dtype) {
    constexpr int kDtype = decltype(dtype)::value;
    parallel_runs(p.rows, team_size(p.rows * p.cols, p.threads), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const char* row = static_cast<const char*>(p.logits) + r * p.row_stride * item_size(kDtype);
        entropy_row<kDtype>(row, p.cols, p.entropy + r, p.lse + r);
      }
    });
  });
}

void softmax_entropy_backward(const SoftmaxEntropyBackwardParams& p) {
  with_dtype(p.dtype, [&](auto dtype) {
    constexpr int kDtype = decltype(dtype)::value;
    parallel_runs(p.rows, team_size(p.rows * p.cols, p.threads), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const char* row = static_cast<const char*>(p.logits) + r * p.row_stride * item_size(kDtype);
        char* out = static_cast<char*>(p.grad_logits) + r * p.grad_row_stride * item_size(kDtype);
        backward_row<kDtype>(row, p.cols, p.entropy[r], p.lse[r], p.grad_entropy[r], out);
      }
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
