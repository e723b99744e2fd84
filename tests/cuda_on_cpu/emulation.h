// Enough of CUDA to compile the kernels' sources as host C++ and run them without a GPU.
//
// Every thread of a block is a fiber; barriers and shuffles switch between fibers, blocks run one
// after the other. A barrier that some thread never reaches ends the process. What this cannot
// show: the code that nvcc generates, races within the device's memory model, and speed.
#pragma once

#include <cuda_runtime.h>
#include <math.h>
#include <string.h>

#undef __global__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

// Runs body(argument) for every thread of every block of the grid.
void run_grid(unsigned grid, unsigned threads, void (*body)(const void*), const void* argument);

void sync_block();

// Leaves `bytes` of every thread of the warp where the others find them.
const void* exchange(const void* value, size_t bytes, unsigned lane);

}  // namespace emulation

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim;

inline void __syncthreads() { emulation::sync_block(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T other;
  memcpy(&other, emulation::exchange(&value, sizeof(T), threadIdx.x % 32 ^ mask), sizeof(T));
  return other;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

template <class T>
void atomicAdd(T* address, T value) {
  *address += value;
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float __uint_as_float(unsigned u) { return bits_as<float>(u); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline double __longlong_as_double(long long u) { return bits_as<double>(u); }

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return cudaFuncGetAttributes(attributes, static_cast<const void*>(nullptr));
}
