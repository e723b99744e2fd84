// out = base + sum_k lambda_k tau_k and dots[k] = <G, tau_k> for one tensor.
//
// Memory is read once, and both results have the bytes of weighted_sum and coefficient_grad: the
// same additions in the same order. Base is read before it is written, so out may be base.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

void combine_and_dot(const CombineAndDotParams& p) {
  int64_t blocks = block_count(p.size);
  int64_t first_block[2] = {0, blocks};
  TensorList tensors = {&p.size, first_block, 1};
  int64_t count = p.source.k;
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    for_each_block(tensors, p.threads, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
      double* partial = p.scratch + b * count;
      for (int64_t k = 0; k < count; ++k) partial[k] = 0.0;
      TileTarget target = {p.grad, p.grad_dtype, partial, p.coefficients, p.out, p.out_dtype};
      dot_range<kDtype, kExperts, 1>(p.source, target, begin, end);
    });
  });
  sum_partials(p.scratch, blocks, count, p.dots);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
