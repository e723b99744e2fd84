// Variance of the K task vectors of every entry, the mean taken off first.
//
// Contiguous tensors; out is overwritten. fp32, added in the order of k and divided by K; the
// second read of the deltas comes from the first-level cache.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Divides by K; kPower says that K is a power of two, whose reciprocal gives the same quotients.
template <bool kPower>
FASTMERGE_INLINE F32 divide(F32 x, float count) {
  return kPower ? x * broadcast(1 / count) : x / broadcast(count);
}

template <int kDtype, int kExperts, bool kPower>
void variance_of_range(const TaskVarianceParams& p, int64_t begin, int64_t end) {
  const Source& s = p.source;
  float count = float(s.k);
  auto variance = [&](auto tau) {
    F32 mean = zeros(), squares = zeros();
    for (int64_t k = 0; k < s.k; ++k) mean = mean + tau(k);
    mean = divide<kPower>(mean, count);
    for (int64_t k = 0; k < s.k; ++k) {
      F32 distance = tau(k) - mean;
      squares = squares + distance * distance;
    }
    return divide<kPower>(squares, count);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    F32 base = kExperts ? load_base(s, i) : zeros();
    store<kFloat32>(p.out, i,
                    variance([&](int64_t k) { return load_tau<kDtype, kExperts>(s, k, i, base); }));
  }
  if (i < end) {
    int64_t n = end - i;
    F32 base = kExperts ? load_base_first(s, i, n) : zeros();
    store_first<kFloat32>(
        p.out, i,
        variance([&](int64_t k) { return load_tau_first<kDtype, kExperts>(s, k, i, n, base); }), n);
  }
}

}  // namespace

void task_variance(const TaskVarianceParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    bool power = (p.source.k & (p.source.k - 1)) == 0;
    int64_t first_block[2] = {0, block_count(p.size)};
    TensorList tensors = {&p.size, first_block, 1};
    for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
      if (power) {
        variance_of_range<kDtype, kExperts, true>(p, begin, end);
      } else {
        variance_of_range<kDtype, kExperts, false>(p, begin, end);
      }
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
