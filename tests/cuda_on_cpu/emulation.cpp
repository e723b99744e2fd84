// Fibers for the threads of a block, and the few runtime functions that the binding calls.
//
// Warps run one after the other, each as far as it gets before a barrier of the block stops it, so
// that a warp which runs ahead of a missing barrier is seen. FASTMERGE_EMULATED_ORDER=reverse takes
// blocks, warps and threads from the last to the first.
// FASTMERGE_EMULATED_DRIVER_ERROR and FASTMERGE_EMULATED_CODE_ERROR are error codes that the
// device count and the look for device code return.
#include "emulation.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <vector>

uint3 threadIdx, blockIdx;
dim3 gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kWarp = 32;
constexpr size_t kValue = 8;

struct Barrier {
  unsigned arrived = 0;
  unsigned long generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
  unsigned exchanges = 0;
  char values[2][kValue];
};

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
Barrier block;
unsigned block_size, current;
unsigned long steps;
ucontext_t scheduler;
void (*body_)(const void*);
const void* argument_;

void wait(Barrier& barrier, unsigned size) {
  unsigned long generation = barrier.generation;
  ++steps;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

void start() {
  body_(argument_);
  fibers[current].done = true;
  ++steps;
}

// Runs a warp until all its threads are done or wait; returns how many got done.
unsigned run_warp(unsigned first, bool reverse) {
  unsigned size = block_size - first < kWarp ? block_size - first : kWarp, done = 0;
  for (unsigned long before = steps - 1; steps != before;) {
    before = steps;
    for (unsigned n = 0; n < size; ++n) {
      current = first + (reverse ? size - 1 - n : n);
      if (fibers[current].done) continue;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      done += fibers[current].done;
    }
  }
  return done;
}

void run_block(bool reverse) {
  block = {};
  warps.assign((block_size + kWarp - 1) / kWarp, {});
  for (unsigned t = 0; t < block_size; ++t) {
    Fiber& fiber = fibers[t];
    fiber.done = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
  }
  unsigned left = block_size;
  while (left > 0) {
    unsigned long before = steps;
    for (unsigned w = 0; w < warps.size(); ++w) {
      unsigned first = (reverse ? unsigned(warps.size()) - 1 - w : w) * kWarp;
      left -= run_warp(first, reverse);
    }
    if (left > 0 && steps == before) {
      fprintf(stderr, "emulated block %u: %u threads wait forever\n", blockIdx.x, left);
      abort();
    }
  }
}

int code(const char* variable) {
  const char* value = getenv(variable);
  return value == nullptr ? 0 : atoi(value);
}

}  // namespace

void run_grid(unsigned grid, unsigned threads, void (*body)(const void*), const void* argument) {
  const char* order = getenv("FASTMERGE_EMULATED_ORDER");
  bool reverse = order != nullptr && strcmp(order, "reverse") == 0;
  if (fibers.size() < threads) fibers.resize(threads);
  body_ = body;
  argument_ = argument;
  block_size = threads;
  gridDim = dim3(grid);
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx = {reverse ? grid - 1 - b : b, 0, 0};
    run_block(reverse);
  }
}

void sync_block() { wait(block, block_size); }

const void* exchange(const void* value, size_t bytes, unsigned lane) {
  // Two slots in turn: no thread can be two exchanges ahead of another one of its warp.
  unsigned slot = fibers[current].exchanges++ % 2, warp = current / kWarp;
  memcpy(fibers[current].values[slot], value, bytes);
  unsigned size = block_size - warp * kWarp < kWarp ? block_size - warp * kWarp : kWarp;
  wait(warps[warp], size);
  return fibers[warp * kWarp + lane].values[slot];
}

}  // namespace emulation

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return static_cast<cudaError_t>(emulation::code("FASTMERGE_EMULATED_DRIVER_ERROR"));
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInsufficientDriver       ? "cudaErrorInsufficientDriver"
         : error == cudaErrorNoKernelImageForDevice ? "cudaErrorNoKernelImageForDevice"
                                                    : "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return static_cast<cudaError_t>(emulation::code("FASTMERGE_EMULATED_CODE_ERROR"));
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  return cudaSuccess;
}
}
