// The sum of a relaxed mask's entries, and its gradient with respect to the logits.
//
// Values are summed in sixteen fp32 lanes over a tile, tiles are folded into fp64, and the blocks'
// sums are added in block order.
#include "kernels.h"
#include "relaxed_mask.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

void concrete_mean(const ConcreteMeanParams& p) {
  for_each_mask_tile(p.mask, p.size, p.threads,
                     [&](int64_t b, int64_t begin, int64_t n, const float* values, const float*) {
                       F32 sum = zeros();
                       for (int64_t i = 0; i < n; i += kLanes) {
                         sum = sum + (n - i < kLanes ? load_first<kFloat32>(values, i, n - i)
                                                     : load<kFloat32>(values, i));
                       }
                       if (begin % kBlock == 0) p.scratch[b] = 0.0;
                       p.scratch[b] += fold(sum);
                     });
  sum_partials(p.scratch, block_count(p.size), 1, p.sum);
}

void concrete_mean_backward(const ConcreteMeanBackwardParams& p) {
  for_each_mask_tile(p.mask, p.size, p.threads,
                     [&](int64_t, int64_t begin, int64_t n, const float*, const float* slopes) {
                       F32 scale = broadcast(p.scale);
                       for (int64_t i = 0; i < n; i += kLanes) {
                         F32 gradient = load<kFloat32>(slopes, i) * scale;
                         if (n - i < kLanes) {
                           store_first<kFloat32>(p.grad_logits, begin + i, gradient, n - i);
                         } else {
                           store<kFloat32>(p.grad_logits, begin + i, gradient);
                         }
                       }
                     });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
