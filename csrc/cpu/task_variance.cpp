// Variance of the K task vectors of every entry, the mean taken off first.
//
// Contiguous tensors; out is overwritten. fp32, added in the order of k and divided by K; the
// second read of the deltas comes from the first-level cache.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

void task_variance(const TaskVarianceParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    const Source& s = p.source;
    int64_t first_block[2] = {0, block_count(p.size)};
    TensorList tensors = {&p.size, first_block, 1};
    F32 count = broadcast(float(s.k));
    for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kLanes) {
        int64_t n = end - i < kLanes ? end - i : kLanes;
        F32 base = zeros();
        if (kExperts) base = n == kLanes ? load_base(s, i) : load_base_first(s, i, n);
        auto tau = [&](int64_t k) {
          return n == kLanes ? load_tau<kDtype, kExperts>(s, k, i, base)
                             : load_tau_first<kDtype, kExperts>(s, k, i, n, base);
        };
        F32 mean = zeros(), squares = zeros();
        for (int64_t k = 0; k < s.k; ++k) mean = mean + tau(k);
        mean = mean / count;
        for (int64_t k = 0; k < s.k; ++k) {
          F32 distance = tau(k) - mean;
          squares = squares + distance * distance;
        }
        store_first<kFloat32>(p.out, i, squares / count, n);
      }
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
