// EMR's election: the unified task vector, packed masks and the norms of the rescalers.
//
// Contiguous tensors; all results are overwritten. Blocks, tiles, lanes and the order of additions
// are those of dots.h: a thread holds kWidth adjacent lanes of one tile, and neighbours join their
// bits of a byte by shuffles. Up to kGroup deltas stay in registers between the election and the
// sums; more are read a second time.
#include "dots.h"
#include "fastmerge/cuda.h"
#include "fastmerge/cuda_launch.h"
#include "tables.h"
#include "vectors.h"

namespace fastmerge::cuda {
namespace {

constexpr int kByte = 8;
constexpr int kVectorWidth = 2;  // of every dtype: each delta and lane has two sums in registers

// Blocks a multiprocessor holds at least: leaves 128 registers a thread, and no spills.
constexpr int resident(int threads) { return 512 / threads; }

struct ElectArguments {
  TensorTable table;
  uint8_t* masks;      // [K, rows, row_bytes]
  int64_t columns;     // of a row
  int64_t task_bytes;  // from the masks of one delta to the next
  bool leave_out;
};
static_assert(sizeof(ElectArguments) <= 4096, "kernel arguments");

// The election of kWidth entries, delta by delta.
template <int kWidth>
struct Election {
  Floats<kWidth> total = {}, largest = {}, smallest = {};

  __device__ __forceinline__ void add(float tau, int v) {
    total.lane[v] = total.lane[v] + (tau == tau ? tau : 0.0f);
    if (tau > largest.lane[v]) largest.lane[v] = tau;
    if (tau < smallest.lane[v]) smallest.lane[v] = tau;
  }

  __device__ __forceinline__ Floats<kWidth> unified(bool leave_out) const {
    Floats<kWidth> r;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      r.lane[v] = total.lane[v] > 0.0f ? largest.lane[v] : smallest.lane[v];
      if (leave_out && total.lane[v] == 0.0f) r.lane[v] = 0.0f;
    }
    return r;
  }
};

// One bit a lane: the first kWidth bits where x is positive, the next where it is negative.
template <int kWidth>
__device__ __forceinline__ uint32_t sign_bits(const Floats<kWidth>& x) {
  uint32_t bits = 0;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    bits |= uint32_t(x.lane[v] > 0.0f) << v | uint32_t(x.lane[v] < 0.0f) << (kWidth + v);
  }
  return bits;
}

template <int kDtype, bool kExperts, int kWidth>
__device__ __forceinline__ void add_group(Election<kWidth>& election,
                                          const Bits<kWidth> (&bits)[kGroup],
                                          const Floats<kWidth>& base, int first, int k) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (first + j >= k) continue;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      election.add(task_vector<kDtype, kExperts>(bits[j], base, v), v);
    }
  }
}

// kOnce: K <= kGroup.
template <int kDtype, bool kExperts, int kWidth, bool kOnce>
__global__ void __launch_bounds__(dot_threads(kWidth), resident(dot_threads(kWidth)))
    elect_kernel(const __grid_constant__ ElectArguments p) {
  constexpr int kThreadsPerTile = kLanes / kWidth, kThreadsPerByte = kByte / kWidth;
  constexpr int kSteps = kTile / kLanes;
  __shared__ double folded[kTiles][2 * kGroup];
  __shared__ uint8_t signs[kOnce ? 1 : int(kBlock) / kWidth];  // each read by who wrote it
  const TensorTable& table = p.table;
  const TableRow& tensor = table.rows[0];
  const int tile = threadIdx.x / kThreadsPerTile, part = threadIdx.x % kThreadsPerTile;
  const int64_t row_blocks = (p.columns + kBlock - 1) / kBlock;
  const int64_t row_bytes = (p.columns + kByte - 1) / kByte;
  const int k = table.k;
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    const int64_t row = unit / row_blocks, column = unit % row_blocks * kBlock + tile * kTile;
    const int64_t begin = row * p.columns + column, row_end = (row + 1) * p.columns;
    const int64_t end = begin + kTile < row_end ? begin + kTile : row_end;
    uint8_t* masks = p.masks + row * row_bytes + column / kByte;
    double* partials = table.partials + unit * 2 * k;
    auto load_origin = [&](int64_t i) {
      Bits<kWidth> bits = {};
      if (kExperts) bits = load_base<kWidth>(tensor.base, i, table.base_dtype);
      return to_floats(bits, table.base_dtype);
    };
    if constexpr (!kOnce) {
      for (int step = 0; step < kSteps; ++step) {
        const int64_t i = begin + step * kLanes + part * kWidth;
        if (i >= end) break;
        const Floats<kWidth> base = load_origin(i);
        Election<kWidth> election;
        for (int first = 0; first < k; first += kGroup) {
          Bits<kWidth> bits[kGroup];
          load_group<kDtype>(bits, table.deltas, first, k, i);
          add_group<kDtype, kExperts>(election, bits, base, first, k);
        }
        const Floats<kWidth> unified = election.unified(p.leave_out);
        store(tensor.out, i, unified, table.out_dtype);
        signs[(tile * kSteps + step) * kThreadsPerTile + part] = uint8_t(sign_bits(unified));
      }
    }
    for (int first = 0; first < k; first += kGroup) {
      Floats<kWidth> all[kGroup] = {}, kept[kGroup] = {};
      for (int step = 0; step < kSteps; ++step) {
        const int64_t i = begin + step * kLanes + part * kWidth;
        const bool inside = i < end;  // shuffles want every thread
        Bits<kWidth> bits[kGroup];
        Floats<kWidth> base = {}, size = {};
        uint32_t sign = 0;
        if (inside) {
          base = load_origin(i);
          load_group<kDtype>(bits, table.deltas, first, k, i);
          if constexpr (kOnce) {
            Election<kWidth> election;
            add_group<kDtype, kExperts>(election, bits, base, first, k);
            const Floats<kWidth> unified = election.unified(p.leave_out);
            store(tensor.out, i, unified, table.out_dtype);
            sign = sign_bits(unified);
          } else {
            sign = signs[(tile * kSteps + step) * kThreadsPerTile + part];
          }
          size = to_floats(load_bits<kWidth, Memory::kWritten>(tensor.out, i, table.out_dtype),
                           table.out_dtype);
        }
        uint8_t* byte = masks + first * p.task_bytes + (step * kLanes + part * kWidth) / kByte;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (first + j >= k) continue;
          uint32_t mask = 0;
          if (inside) {
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
              float tau = task_vector<kDtype, kExperts>(bits[j], base, v);
              uint32_t side = tau > 0.0f ? sign : tau < 0.0f ? sign >> kWidth : 0u;
              uint32_t agrees = side >> v & 1u;
              mask |= agrees << v;
              all[j].lane[v] = all[j].lane[v] + fabsf(tau);
              kept[j].lane[v] = kept[j].lane[v] + (agrees ? fabsf(size.lane[v]) : 0.0f);
            }
          }
          mask <<= part % kThreadsPerByte * kWidth;
#pragma unroll
          for (int other = 1; other < kThreadsPerByte; other *= 2) {
            mask |= __shfl_xor_sync(0xffffffffu, mask, other);
          }
          if (inside && part % kThreadsPerByte == 0) *byte = uint8_t(mask);
          byte += p.task_bytes;
        }
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (first + j >= k) continue;
        double of_all = fold(all[j]), of_kept = fold(kept[j]);
        if (part == 0) folded[tile][j] = of_all, folded[tile][kGroup + j] = of_kept;
      }
      __syncthreads();
      const int c = threadIdx.x, j = c % kGroup;
      if (c < 2 * kGroup && first + j < k) {
        double sum = 0.0;
        for (int t = 0; t < kTiles; ++t) sum += folded[t][c];
        partials[(c < kGroup ? 0 : k) + first + j] = sum;
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t elect(ElectParams p, cudaStream_t stream) {
  if (p.tensors.count != 1 || p.tensors.k > kMaxDeltas) return cudaErrorInvalidValue;
  const int64_t blocks = mask_blocks(p.rows, p.columns), sums = 2 * p.tensors.k;
  const int64_t row_bytes = (p.columns + kByte - 1) / kByte;
  const bool joined = p.columns % kByte == 0;
  ElectArguments arguments = {single_table(p.tensors, p.unified, p.unified_dtype), p.masks,
                              joined ? p.rows * p.columns : p.columns, p.rows * row_bytes,
                              p.leave_out};
  arguments.table.units = blocks;
  arguments.table.partials = p.scratch;
  const int64_t most = int64_t(p.multiprocessors) * kDotBlocksPerMultiprocessor;
  const bool vectors =
      joined && has_vectors(p.tensors, 0, full_width(p.tensors.delta_dtype), nullptr, p.unified);
  auto launch_kernel = [&](auto dtype, auto experts, auto width) {
    constexpr int kDtype = decltype(dtype)::value;
    constexpr int kWidth = decltype(width)::value > 1 ? kVectorWidth : 1;
    constexpr bool kExperts = decltype(experts)::value;
    auto run = [&](void (*kernel)(ElectArguments)) {
      return launch(kernel, blocks, most, dot_threads(kWidth), arguments, stream);
    };
    if (p.tensors.k <= kGroup) return run(elect_kernel<kDtype, kExperts, kWidth, true>);
    return run(elect_kernel<kDtype, kExperts, kWidth, false>);
  };
  cudaError_t error = with_source(p.tensors.delta_dtype, p.tensors.experts, vectors, launch_kernel);
  if (error != cudaSuccess) return error;
  SumArguments sum = {p.scratch, p.magnitudes, blocks, sums};
  return launch(sum_blocks_kernel, (sums + kSumThreads - 1) / kSumThreads, most, kSumThreads, sum,
                stream);
}

}  // namespace fastmerge::cuda
