// Inner products <G, tau_k> in two stages, alone or together with the weighted sum.
//
// The order of additions is the CPU kernels': within a tile of kTile elements, lane j of kLanes
// adds the products of elements j, j + kLanes, ... in fp32; the lanes are folded into fp64 as a
// tree; tiles are added in order to the sum of a block of kBlock elements, and a second kernel
// adds the blocks in order. One CUDA block computes the sums of kBlock elements, a thread holds
// kWidth adjacent lanes of one tile. No atomics.
#pragma once

#include <stdint.h>

#include "fastmerge/cuda_launch.h"
#include "tables.h"
#include "vectors.h"

namespace fastmerge::cuda {

constexpr int kLanes = 16;
constexpr int kTile = 512;
constexpr int kTiles = int(kBlock) / kTile;
constexpr int kDotBlocksPerMultiprocessor = 32;

// Threads that share the block's tiles.
constexpr int dot_threads(int width) { return kTiles * kLanes / width; }

// Sum of a tile's lanes; every thread of the tile gets it.
template <int kWidth>
__device__ __forceinline__ double fold(const Floats<kWidth>& lanes) {
  double sum[kWidth];
#pragma unroll
  for (int v = 0; v < kWidth; ++v) sum[v] = double(lanes.lane[v]);
#pragma unroll
  for (int step = kLanes / 2; step >= 1; step /= 2) {
    if (step >= kWidth) {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        sum[v] += __shfl_xor_sync(0xffffffffu, sum[v], step / kWidth);
      }
    } else {
#pragma unroll
      for (int v = 0; v < step; ++v) sum[v] += sum[v + step];
    }
  }
  return sum[0];
}

// Deltas whose sums a thread holds at once, and the narrower vectors that leave registers for the
// larger number.
constexpr int kMostDots = 32;
constexpr int kNarrowWidth = 2;

// kCount deltas share one read of base and gradient; more take further reads. kCombine also writes
// the weighted sum; then K <= kCount.
template <int kDtype, bool kExperts, int kWidth, int kCount, bool kCombine>
__global__ void __launch_bounds__(dot_threads(kWidth))
    dot_kernel(const __grid_constant__ TensorTable table) {
  __shared__ double folded[kTiles][kCount];
  constexpr int kThreadsPerTile = kLanes / kWidth;
  const int tile = threadIdx.x / kThreadsPerTile, part = threadIdx.x % kThreadsPerTile;
  const int k = table.k;
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    const int r = row_of(table, unit);
    const TableRow& row = table.rows[r];
    const void* const* deltas = table.deltas + r * k;
    const float* coefficients = table.coefficients + row.index * k;
    const int64_t block = unit - row.first_unit;
    const int64_t begin = block * kBlock + tile * kTile;
    const int64_t end = begin + kTile < row.size ? begin + kTile : row.size;
    double* partials = table.partials + (row.first_block + block) * k;
    for (int first = 0; first < k; first += kCount) {
      Floats<kWidth> lanes[kCount] = {};
      for (int64_t i = begin + part * kWidth; i < end; i += kLanes) {
        Bits<kWidth> base_bits = {};
        Bits<kWidth> grad_bits = load_bits<kWidth>(row.grad, i, table.grad_dtype);
        if (kExperts || kCombine) base_bits = load_base<kWidth>(row.base, i, table.base_dtype);
        Floats<kWidth> grad, base, sum;
#pragma unroll
        for (int group = 0; group < kCount; group += kGroup) {
          if (first + group >= k) continue;
          Bits<kWidth> bits[kGroup];
          float scalars[kGroup];
          if (kCombine) load_scalars(scalars, coefficients, group, k);
          load_group<kDtype>(bits, deltas, first + group, k, i);
          if (group == 0) {
            grad = to_floats(grad_bits, table.grad_dtype);
            sum = base = to_floats(base_bits, table.base_dtype);
          }
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            if (first + group + j >= k) continue;
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
              float tau = task_vector<kDtype, kExperts>(bits[j], base, v);
              float& lane = lanes[group + j].lane[v];
              lane = lane + grad.lane[v] * tau;
              if (kCombine) sum.lane[v] = sum.lane[v] + scalars[j] * tau;
            }
          }
        }
        if (kCombine) store(row.out, i, sum, table.out_dtype);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (first + j >= k) continue;
        double sum = fold(lanes[j]);
        if (part == 0) folded[tile][j] = sum;
      }
      __syncthreads();
      if (int(threadIdx.x) < kCount && first + int(threadIdx.x) < k) {
        double sum = 0.0;
        for (int t = 0; t < kTiles; ++t) sum += folded[t][threadIdx.x];
        partials[first + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

constexpr int kSumThreads = 32;

// dots[l, k] = sum over the blocks of tensor l, in order, of their partial sums.
static __global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const __grid_constant__ TensorTable table) {
  const int k_count = table.k;
  for (int r = blockIdx.x; r < table.count; r += gridDim.x) {
    const TableRow& row = table.rows[r];
    const double* partials = table.partials + row.first_block * k_count;
    const int64_t blocks = (row.size + kBlock - 1) / kBlock;
    for (int k = threadIdx.x; k < k_count; k += kSumThreads) {
      double sum = 0.0;
#pragma unroll 16
      for (int64_t b = 0; b < blocks; ++b) sum += partials[b * k_count + k];
      table.dots[row.index * k_count + k] =
          sum == sum ? sum : __longlong_as_double(0x7ff8000000000000LL);
    }
  }
}

struct SumArguments {
  const double* partials;  // [blocks, columns]
  double* sums;            // [columns]
  int64_t blocks;
  int64_t columns;
};

// sums[c] = sum over the blocks, in order, of their partial sums.
static __global__ void __launch_bounds__(kSumThreads)
    sum_blocks_kernel(const __grid_constant__ SumArguments p) {
  for (int64_t c = blockIdx.x * kSumThreads + threadIdx.x; c < p.columns;
       c += int64_t(gridDim.x) * kSumThreads) {
    double sum = 0.0;
#pragma unroll 16
    for (int64_t b = 0; b < p.blocks; ++b) sum += p.partials[b * p.columns + c];
    p.sums[c] = sum == sum ? sum : __longlong_as_double(0x7ff8000000000000LL);
  }
}

// Both stages for a whole list.
template <bool kCombine>
cudaError_t launch_dots(const TensorList& list, const void* const* grads, void* const* outs,
                        const TensorTable& common, int multiprocessors, cudaStream_t stream) {
  int64_t most = int64_t(multiprocessors) * kDotBlocksPerMultiprocessor;
  auto run = [&](const TensorTable& table, bool vectors) {
    auto launch_kernel = [&](auto dtype, auto experts, auto width) {
      constexpr int kDtype = decltype(dtype)::value, kWidth = decltype(width)::value;
      constexpr int kNarrow = kWidth < kNarrowWidth ? kWidth : kNarrowWidth;
      constexpr bool kExperts = decltype(experts)::value;
      if (list.k <= kGroup) {
        return launch(dot_kernel<kDtype, kExperts, kWidth, kGroup, kCombine>, table.units, most,
                      dot_threads(kWidth), table, stream);
      }
      return launch(dot_kernel<kDtype, kExperts, kNarrow, kMostDots, kCombine>, table.units, most,
                    dot_threads(kNarrow), table, stream);
    };
    cudaError_t error = with_source(list.delta_dtype, list.experts, vectors, launch_kernel);
    if (error != cudaSuccess) return error;
    return launch(sum_partials_kernel, table.count, kTableRows, kSumThreads, table, stream);
  };
  return for_each_table(list, grads, outs, common, run);
}

}  // namespace fastmerge::cuda
