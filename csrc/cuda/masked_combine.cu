// base + sum_k lambda_k (unified where mask_k), the inner products <G, unified where mask_k>, or
// both.
//
// Contiguous tensors; results are overwritten, out may be base. The sum goes entry by entry in the
// order of k. Blocks, tiles, lanes and the order of additions of the products are those of dots.h.
#include "dots.h"
#include "fastmerge/cuda.h"
#include "fastmerge/cuda_launch.h"
#include "vectors.h"

namespace fastmerge::cuda {
namespace {

constexpr int kByte = 8;
constexpr int kCombineThreads = 256;
constexpr int kCombineBlocksPerMultiprocessor = 8;

struct MaskedArguments {
  const void* base;
  const void* unified;
  void* out;
  const void* grad;
  const float* coefficients;  // [K]
  double* partials;           // [blocks, K]
  int64_t units;
  int64_t columns;    // of a row
  int64_t row_bytes;  // of a row of masks
  int k;
  int base_dtype;
  int out_dtype;
  int grad_dtype;
  bool skip_zeros;
  const uint8_t* masks[kMaxDeltas];
};
static_assert(sizeof(MaskedArguments) <= 4096, "kernel arguments");

// Entries [begin, end) of one unit, whose masks start at `byte`.
struct Span {
  int64_t begin;
  int64_t end;
  int64_t byte;
};

__device__ __forceinline__ Span unit_span(const MaskedArguments& p, int64_t unit) {
  const int64_t row_blocks = (p.columns + kBlock - 1) / kBlock;
  const int64_t row = unit / row_blocks, column = unit % row_blocks * kBlock;
  const int64_t last = column + kBlock < p.columns ? column + kBlock : p.columns;
  const int64_t start = row * p.columns;
  return {start + column, start + last, row * p.row_bytes + column / kByte};
}

template <int kDtype, int kWidth>
__global__ void __launch_bounds__(kCombineThreads)
    masked_sum_kernel(const __grid_constant__ MaskedArguments p) {
  for (int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const Span span = unit_span(p, unit);
    for (int64_t i = span.begin + threadIdx.x * kWidth; i < span.end;
         i += kCombineThreads * kWidth) {
      const Bits<kWidth> base_bits = load_base<kWidth>(p.base, i, p.base_dtype);
      const Bits<kWidth> unified_bits = load_bits<kDtype, kWidth>(p.unified, i);
      const int64_t byte = span.byte + (i - span.begin) / kByte;
      const int shift = int((i - span.begin) % kByte);
      Floats<kWidth> sum = to_floats(base_bits, p.base_dtype);
      const Floats<kWidth> unified = to_floats(unified_bits, kDtype);
      for (int first = 0; first < p.k; first += kGroup) {
        float scalars[kGroup];
        uint32_t bits[kGroup] = {};
        load_scalars(scalars, p.coefficients, first, p.k);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (first + j >= p.k || (p.skip_zeros && scalars[j] == 0.0f)) continue;
          bits[j] = __ldg(p.masks[first + j] + byte) >> shift;
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
          for (int v = 0; v < kWidth; ++v) {
            if (bits[j] >> v & 1u) sum.lane[v] = sum.lane[v] + scalars[j] * unified.lane[v];
          }
        }
      }
      store(p.out, i, sum, p.out_dtype);
    }
  }
}

// One block a multiprocessor is enough to ask for: asked for more, or for nothing, the assembler
// spills on some architectures.
template <int kDtype, int kWidth>
__global__ void __launch_bounds__(dot_threads(kWidth), 1)
    masked_dot_kernel(const __grid_constant__ MaskedArguments p) {
  __shared__ double folded[kTiles][kGroup];
  constexpr int kThreadsPerTile = kLanes / kWidth;
  const int tile = threadIdx.x / kThreadsPerTile, part = threadIdx.x % kThreadsPerTile;
  for (int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const Span span = unit_span(p, unit);
    const int64_t begin = span.begin + tile * kTile;
    const int64_t end = begin + kTile < span.end ? begin + kTile : span.end;
    double* partials = p.partials + unit * p.k;
    for (int first = 0; first < p.k; first += kGroup) {
      Floats<kWidth> lanes[kGroup] = {};
      for (int64_t i = begin + part * kWidth; i < end; i += kLanes) {
        const Bits<kWidth> grad_bits = load_bits<kWidth>(p.grad, i, p.grad_dtype);
        const Bits<kWidth> unified_bits = load_bits<kDtype, kWidth>(p.unified, i);
        const int64_t byte = span.byte + (i - span.begin) / kByte;
        const int shift = int((i - span.begin) % kByte);
        uint32_t bits[kGroup] = {};
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (first + j < p.k) bits[j] = __ldg(p.masks[first + j] + byte) >> shift;
        }
        const Floats<kWidth> grad = to_floats(grad_bits, p.grad_dtype);
        const Floats<kWidth> unified = to_floats(unified_bits, kDtype);
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          const float product = grad.lane[v] * unified.lane[v];
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            if (bits[j] >> v & 1u) lanes[j].lane[v] = lanes[j].lane[v] + product;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (first + j >= p.k) continue;
        double sum = fold(lanes[j]);
        if (part == 0) folded[tile][j] = sum;
      }
      __syncthreads();
      if (int(threadIdx.x) < kGroup && first + int(threadIdx.x) < p.k) {
        double sum = 0.0;
        for (int t = 0; t < kTiles; ++t) sum += folded[t][threadIdx.x];
        partials[first + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t masked_combine(MaskedCombineParams p, cudaStream_t stream) {
  if (p.k > kMaxDeltas) return cudaErrorInvalidValue;
  const bool joined = p.columns % kByte == 0;
  MaskedArguments arguments = {};
  arguments.base = p.base, arguments.unified = p.unified;
  arguments.out = p.out, arguments.grad = p.grad;
  arguments.coefficients = p.coefficients;
  arguments.partials = p.scratch;
  arguments.units = mask_blocks(p.rows, p.columns);
  arguments.columns = joined ? p.rows * p.columns : p.columns;
  arguments.row_bytes = (p.columns + kByte - 1) / kByte;
  arguments.k = int(p.k);
  arguments.base_dtype = p.base_dtype, arguments.out_dtype = p.out_dtype;
  arguments.grad_dtype = p.grad_dtype;
  arguments.skip_zeros = p.grad == nullptr;
  for (int64_t k = 0; k < p.k; ++k) arguments.masks[k] = p.masks[k];
  auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  const uintptr_t all = address(p.base) | address(p.unified) | address(p.out) | address(p.grad);
  const bool vectors = joined && all % 16 == 0;
  auto launch_kernels = [&](auto dtype, auto, auto width) {
    constexpr int kDtype = decltype(dtype)::value, kWidth = decltype(width)::value;
    const int64_t blocks = p.multiprocessors;
    if (p.grad != nullptr) {
      cudaError_t error =
          launch(masked_dot_kernel<kDtype, kWidth>, arguments.units,
                 blocks * kDotBlocksPerMultiprocessor, dot_threads(kWidth), arguments, stream);
      if (error != cudaSuccess) return error;
      SumArguments sum = {p.scratch, p.dots, arguments.units, p.k};
      error = launch(sum_blocks_kernel, (p.k + kSumThreads - 1) / kSumThreads,
                     blocks * kDotBlocksPerMultiprocessor, kSumThreads, sum, stream);
      if (error != cudaSuccess) return error;
    }
    if (p.out == nullptr) return cudaSuccess;
    return launch(masked_sum_kernel<kDtype, kWidth>, arguments.units,
                  blocks * kCombineBlocksPerMultiprocessor, kCombineThreads, arguments, stream);
  };
  return with_source(p.unified_dtype, false, vectors, launch_kernels);
}

}  // namespace fastmerge::cuda
