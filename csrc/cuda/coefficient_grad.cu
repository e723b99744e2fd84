// dots[l, k] = <G_l, tau_lk> for a list of tensors.
//
// Contiguous tensors; dots is overwritten. The order of additions is told in dots.h.
#include "dots.h"
#include "fastmerge/cuda.h"

namespace fastmerge::cuda {

cudaError_t coefficient_grad(CoefficientGradParams p, cudaStream_t stream) {
  TensorTable common = {};
  common.partials = p.scratch;
  common.dots = p.dots;
  common.grad_dtype = p.grad_dtype;
  return launch_dots<false>(p.tensors, p.grads, nullptr, common, p.multiprocessors, stream);
}

}  // namespace fastmerge::cuda
