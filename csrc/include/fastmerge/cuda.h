// Parameters and launchers of the CUDA kernels.
//
// A launcher takes its parameters and a stream and returns cudaError_t. It never allocates,
// synchronises or throws; checks, allocation and the current device belong to the caller.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace fastmerge::cuda {

// arch[0] = the architecture whose code runs on the current device, e.g. 900.
struct ProbeParams {
  int32_t* arch;  // [1], on the device
};

cudaError_t probe(const ProbeParams& params, cudaStream_t stream);

// Whether the binary holds code for the current device; needs no launch.
cudaError_t has_device_code();

}  // namespace fastmerge::cuda
