// dots[l, k] = <G_l, tau_lk> for a list of tensors.
//
// Contiguous tensors; dots is overwritten. Products are fp32, tiles are folded into fp64, and the
// blocks' partial sums are added in block order: the same bytes for any number of threads.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

void coefficient_grad(const CoefficientGradParams& p) {
  with_source(p.delta_dtype, p.experts, [&](auto dtype, auto experts) {
    for_each_block(p.tensors, p.threads, [&](int64_t t, int64_t b, int64_t begin, int64_t end) {
      Source source = {p.bases[t], p.deltas + t * p.k, p.k, p.base_dtype, p.delta_dtype, p.experts};
      double* partial = p.scratch + b * p.k;
      for (int64_t k = 0; k < p.k; ++k) partial[k] = 0.0;
      TileTarget target = {p.grads[t], p.grad_dtype, partial, nullptr, nullptr, kFloat32};
      dot_range<decltype(dtype)::value, decltype(experts)::value, 0>(source, target, begin, end);
    });
  });
  for (int64_t t = 0; t < p.tensors.count; ++t) {
    sum_partials(p.scratch + p.tensors.first_block[t] * p.k, block_count(p.tensors.sizes[t]), p.k,
                 p.dots + t * p.k);
  }
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
