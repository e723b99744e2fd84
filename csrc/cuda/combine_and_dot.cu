// out = base + sum_k lambda_k tau_k and dots[l, k] = <G_l, tau_lk> for a list of tensors.
//
// Contiguous tensors; out and dots are overwritten, out may be base. Bytes are those of
// weighted_sum and coefficient_grad. Up to kMostDots deltas are read once; the sums of more do not
// fit into registers and go through those two, products first since out may be base.
#include "dots.h"
#include "fastmerge/cuda.h"

namespace fastmerge::cuda {

cudaError_t combine_and_dot(CombineAndDotParams p, cudaStream_t stream) {
  if (p.tensors.k == 0 || p.tensors.k > kMostDots) {
    cudaError_t error = coefficient_grad(
        {p.tensors, p.grads, p.dots, p.scratch, p.grad_dtype, p.multiprocessors}, stream);
    if (error != cudaSuccess) return error;
    return weighted_sum({p.tensors, p.coefficients, p.outs, p.out_dtype, p.multiprocessors},
                        stream);
  }
  TensorTable common = {};
  common.coefficients = p.coefficients;
  common.partials = p.scratch;
  common.dots = p.dots;
  common.grad_dtype = p.grad_dtype;
  common.out_dtype = p.out_dtype;
  return launch_dots<true>(p.tensors, p.grads, p.outs, common, p.multiprocessors, stream);
}

}  // namespace fastmerge::cuda
