// The one place where kernels are launched. Kernels take a single struct of parameters.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastmerge::cuda {

// Launches at most `most` blocks for `units` of work; kernels stride over the units by the grid.
template <class Params>
cudaError_t launch(void (*kernel)(Params), int64_t units, int64_t most, int threads,
                   const Params& params, cudaStream_t stream) {
  if (units == 0) return cudaSuccess;
  kernel<<<unsigned(units < most ? units : most), threads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace fastmerge::cuda
