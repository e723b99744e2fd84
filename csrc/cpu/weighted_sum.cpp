// out = base + sum_k lambda_k tau_k for a list of tensors, rounded once.
//
// Contiguous tensors; out is overwritten and may be base. Every element is independent, so bytes
// do not depend on how the work is shared out.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

void weighted_sum(const WeightedSumParams& p) {
  with_source(p.delta_dtype, p.experts, [&](auto dtype, auto experts) {
    for_each_block(p.tensors, p.threads, [&](int64_t t, int64_t, int64_t begin, int64_t end) {
      Source source = {p.bases[t], p.deltas + t * p.k, p.k, p.base_dtype, p.delta_dtype, p.experts};
      combine_range<decltype(dtype)::value, decltype(experts)::value>(
          source, p.coefficients + t * p.k, p.outs[t], p.out_dtype, begin, end);
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
