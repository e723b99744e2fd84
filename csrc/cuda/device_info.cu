// Tells whether this binary runs on a device.
//
// One thread writes one int32 that the caller allocated. No other effect.
#include "fastmerge/cuda.h"
#include "fastmerge/cuda_launch.h"

namespace fastmerge::cuda {
namespace {

__global__ void probe_kernel(ProbeParams params) {
#ifdef __CUDA_ARCH__
  *params.arch = __CUDA_ARCH__;
#endif
}

}  // namespace

cudaError_t probe(ProbeParams params, cudaStream_t stream) {
  return launch(probe_kernel, 1, 1, 1, params, stream);
}

cudaError_t has_device_code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

}  // namespace fastmerge::cuda
