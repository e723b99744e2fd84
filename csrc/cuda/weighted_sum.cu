// out = base + sum_k lambda_k tau_k for a list of tensors, rounded once.
//
// Contiguous tensors; out is overwritten and may be base. Additions go in order of k. Every
// element is independent, so bytes do not depend on the grid.
#include "fastmerge/cuda.h"
#include "fastmerge/cuda_launch.h"
#include "tables.h"
#include "vectors.h"

namespace fastmerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;  // blocks a multiprocessor holds at least: bounds the registers
constexpr int kBlocksPerMultiprocessor = 8;

template <int kDtype, bool kExperts, int kWidth>
__device__ __forceinline__ Floats<kWidth> combine(const TensorTable& table, const TableRow& row,
                                                  const void* const* deltas, int64_t i) {
  const float* coefficients = table.coefficients + row.index * table.k;
  Bits<kWidth> bits[kGroup];
  float scalars[kGroup];
  Bits<kWidth> base_bits = load_base<kWidth>(row.base, i, table.base_dtype);
  load_scalars(scalars, coefficients, 0, table.k);
  load_group<kDtype>(bits, deltas, 0, table.k, i);
  Floats<kWidth> base = to_floats(base_bits, table.base_dtype), sum = base;
  for (int first = 0; first < table.k; first += kGroup) {
    if (first > 0) {
      load_scalars(scalars, coefficients, first, table.k);
      load_group<kDtype>(bits, deltas, first, table.k, i);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (first + j >= table.k) continue;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        float tau = task_vector<kDtype, kExperts>(bits[j], base, v);
        sum.lane[v] = sum.lane[v] + scalars[j] * tau;
      }
    }
  }
  return sum;
}

template <int kDtype, bool kExperts, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    weighted_sum_kernel(const __grid_constant__ TensorTable table) {
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    int r = row_of(table, unit);
    const TableRow& row = table.rows[r];
    int64_t begin = (unit - row.first_unit) * kBlock;
    int64_t end = begin + kBlock < row.size ? begin + kBlock : row.size;
    for (int64_t i = begin + threadIdx.x * kWidth; i < end; i += kThreads * kWidth) {
      auto sum = combine<kDtype, kExperts, kWidth>(table, row, table.deltas + r * table.k, i);
      store(row.out, i, sum, table.out_dtype);
    }
  }
}

}  // namespace

cudaError_t weighted_sum(WeightedSumParams p, cudaStream_t stream) {
  TensorTable common = {};
  common.coefficients = p.coefficients;
  common.out_dtype = p.out_dtype;
  int64_t most = int64_t(p.multiprocessors) * kBlocksPerMultiprocessor;
  auto run = [&](const TensorTable& table, bool vectors) {
    auto launch_kernel = [&](auto dtype, auto experts, auto width) {
      constexpr int kDtype = decltype(dtype)::value, kWidth = decltype(width)::value;
      constexpr bool kExperts = decltype(experts)::value;
      return launch(weighted_sum_kernel<kDtype, kExperts, kWidth>, table.units, most, kThreads,
                    table, stream);
    };
    return with_source(p.tensors.delta_dtype, p.tensors.experts, vectors, launch_kernel);
  };
  return for_each_table(p.tensors, nullptr, p.outs, common, run);
}

}  // namespace fastmerge::cuda
