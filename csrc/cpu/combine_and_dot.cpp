// out = base + sum_k lambda_k tau_k and dots[k] = <G, tau_k> for one tensor.
//
// Each tile is combined and then multiplied while it is in the first-level cache, by the same two
// loops that weighted_sum and coefficient_grad run: memory is read once and the bytes of both
// results are theirs. The product goes first, since out may be base.
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
      for (int64_t tile = begin; tile < end; tile += kTile) {
        int64_t tile_end = tile + kTile < end ? tile + kTile : end;
        dot_range<kDtype, kExperts>(p.source, p.grad, p.grad_dtype, partial, tile, tile_end);
        combine_range<kDtype, kExperts>(p.source, p.coefficients, p.out, p.out_dtype, tile,
                                        tile_end);
      }
    });
  });
  sum_partials(p.scratch, blocks, count, p.dots);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
