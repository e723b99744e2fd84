// Stands in for the header of the same name that launches kernels on a device.
#pragma once

#include <stdint.h>

namespace fastmerge::cuda {

template <class Params>
struct Call {
  void (*kernel)(Params);
  const Params& params;
};

template <class Params>
cudaError_t launch(void (*kernel)(Params), int64_t units, int64_t most, int threads,
                   const Params& params, cudaStream_t) {
  if (units == 0) return cudaSuccess;
  static_assert(sizeof(Params) <= 4096, "kernel arguments");
  Call<Params> call = {kernel, params};
  auto body = [](const void* argument) {
    auto* c = static_cast<const Call<Params>*>(argument);
    c->kernel(c->params);
  };
  emulation::run_grid(unsigned(units < most ? units : most), threads, body, &call);
  return cudaSuccess;
}

}  // namespace fastmerge::cuda
