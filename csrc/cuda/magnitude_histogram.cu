// Counts of the high or the low bits of |tau|, and the exact k-th magnitude read from them without
// the host.
//
// Contiguous tensors; counts is added to. Integers only after the subtraction, so every order of
// counting gives the same result. Every NaN is counted as the quiet NaN, above infinity.
//
// A CUDA block counts the frequent bins in shared memory and adds them up once; the others go to
// global memory at once. Any data gives the same counts, only the speed differs.
#include "fastmerge/cuda.h"
#include "fastmerge/cuda_launch.h"
#include "tables.h"
#include "vectors.h"

namespace fastmerge::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kBatch = 4;  // vectors whose loads are under way at once
constexpr int kLowBits = 15;
constexpr uint32_t kLowMask = (1u << kLowBits) - 1;

// Level 0: kSlots bins of shared memory cover 2^-31 <= |tau| < 2, one more the zeros.
constexpr uint32_t kSlots = 8192;
constexpr uint32_t kFirstBin = (127 - 31) << (23 - kLowBits);

__device__ __forceinline__ uint32_t high_slot(uint32_t bin) {
  uint32_t slot = bin - kFirstBin;  // wraps around below the first
  return slot < kSlots ? slot : bin == 0 ? kSlots : kSlots + 1;
}

// Level 1: a 16-bit dtype leaves at most the two highest of these bits set; as the lowest ones
// they bring its bins into shared memory.
__device__ __forceinline__ uint32_t low_slot(uint32_t bin) {
  uint32_t slot = (bin >> 13) | ((bin & 0x1fffu) << 2);
  return slot < kSlots ? slot : kSlots + 1;
}

__device__ __forceinline__ uint32_t bin_of_slot(uint32_t slot, int level) {
  if (level == 1) return (slot >> 2) | ((slot & 3u) << 13);
  return slot == kSlots ? 0 : slot + kFirstBin;
}

template <int kDtype, bool kExperts, int kWidth>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const __grid_constant__ MagnitudeHistogramParams p) {
  __shared__ unsigned int table[kSlots + 1];
  const uint32_t prefix = uint32_t(p.bits == nullptr ? p.prefix : *p.bits);
  for (uint32_t slot = threadIdx.x; slot <= kSlots; slot += kThreads) table[slot] = 0;
  __syncthreads();
  const int64_t step = int64_t(gridDim.x) * kThreads * kWidth;
  int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  for (; begin < p.size; begin += step * kBatch) {
    Bits<kWidth> bits[kBatch], base_bits[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int64_t i = begin + b * step;
      if (i >= p.size) continue;
      bits[b] = load_bits<kDtype, kWidth>(p.delta, i);
      if (kExperts) base_bits[b] = load_bits<kWidth>(p.base, i, p.base_dtype);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b * step >= p.size) continue;
      Floats<kWidth> base = to_floats(base_bits[b], p.base_dtype);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        float tau = task_vector<kDtype, kExperts>(bits[b], base, v);
        uint32_t u = __float_as_uint(canonical_nan(tau)) & 0x7fffffffu;
        if (p.level == 1 && u >> kLowBits != prefix) continue;
        uint32_t bin = p.level == 0 ? u >> kLowBits : u & kLowMask;
        uint32_t slot = p.level == 0 ? high_slot(bin) : low_slot(bin);
        if (slot <= kSlots) {
          atomicAdd(&table[slot], 1u);
        } else {
          atomicAdd(&p.counts[bin], 1ull);
        }
      }
    }
  }
  __syncthreads();
  for (uint32_t slot = threadIdx.x; slot <= kSlots; slot += kThreads) {
    if (table[slot] == 0) continue;
    atomicAdd(&p.counts[bin_of_slot(slot, p.level)], static_cast<unsigned long long>(table[slot]));
  }
}

constexpr int kBinsPerThread = int(kHistogramBins) / kThreads;

__global__ void __launch_bounds__(kThreads)
    refine_kernel(const __grid_constant__ MagnitudeRefineParams p) {
  __shared__ unsigned long long reached[2][kThreads];
  const unsigned long long position = static_cast<unsigned long long>(*p.position);
  const int64_t high_bits = *p.bits;
  const int first = int(threadIdx.x) * kBinsPerThread;
  unsigned long long sum = 0;
  for (int bin = first; bin < first + kBinsPerThread; ++bin) sum += p.counts[bin];
  int turn = 0;
  reached[turn][threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = 1; step < kThreads; step *= 2) {
    unsigned long long before = threadIdx.x >= step ? reached[turn][threadIdx.x - step] : 0;
    reached[1 - turn][threadIdx.x] = reached[turn][threadIdx.x] + before;
    turn = 1 - turn;
    __syncthreads();
  }
  if (threadIdx.x == 0 && reached[turn][kThreads - 1] == 0) *p.bits = 0;
  unsigned long long below = reached[turn][threadIdx.x] - sum;
  if (position <= below || position > below + sum) return;
  int bin = first;
  while (below + p.counts[bin] < position) below += p.counts[bin++];
  *p.bits = (p.level == 0 ? 0 : high_bits << kLowBits) | bin;
  *p.position = int64_t(position - below);
}

}  // namespace

cudaError_t magnitude_refine(MagnitudeRefineParams p, cudaStream_t stream) {
  return launch(refine_kernel, 1, 1, kThreads, p, stream);
}

cudaError_t magnitude_histogram(MagnitudeHistogramParams p, cudaStream_t stream) {
  const void* origin = p.experts ? p.base : nullptr;
  TensorList list = {&p.size, &origin, &p.delta, 1, 1, p.base_dtype, p.delta_dtype, p.experts};
  int width = full_width(p.delta_dtype);
  bool vectors = has_vectors(list, 0, width, nullptr, nullptr);
  // A CUDA block's 32-bit counters must not overflow.
  int64_t least = p.size >> 31, most = int64_t(p.multiprocessors) * kBlocksPerMultiprocessor;
  auto launch_kernel = [&](auto dtype, auto experts, auto lanes) {
    constexpr int kDtype = decltype(dtype)::value, kWidth = decltype(lanes)::value;
    constexpr bool kExperts = decltype(experts)::value;
    int64_t per_block = int64_t(kThreads) * kWidth;
    return launch(histogram_kernel<kDtype, kExperts, kWidth>, (p.size + per_block - 1) / per_block,
                  most > least ? most : least + 1, kThreads, p, stream);
  };
  return with_source(p.delta_dtype, p.experts, vectors, launch_kernel);
}

}  // namespace fastmerge::cuda
