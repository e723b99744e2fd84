// TIES: trim by given thresholds, elect a sign per entry, merge what agrees with it.
//
// Contiguous tensors; out and masks are overwritten, stats is overwritten. Sums are fp32 in order
// of k. A NaN is below every threshold, hence trimmed. Positive and negative values are summed
// side by side, so the merge needs a single pass over the deltas for any K. Statistics are sums of
// integers, hence the same for any grid. A majority that is the tensor's own is read by a second
// launch from the statistics of the first, so that no host waits for them.
#include "fastmerge/cuda.h"
#include "fastmerge/cuda_launch.h"
#include "tables.h"
#include "vectors.h"

namespace fastmerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kWarp = 32;

// What a launch has to do with the election.
enum class Pass {
  kVote,     // add to stats; `majority` is given
  kCorrect,  // stats give the majority; the output has been written with majority 0
  kWrite,    // stats give the majority; nothing has been written
};

struct MergeArguments {
  TensorTable table;
  const float* thresholds;  // [K]
  unsigned long long* stats;
  float scaling;
  int majority;
  Pass pass;
  bool add_base;
};

struct MasksArguments {
  TensorTable table;
  const float* thresholds;  // [K]
  uint8_t* masks;           // [K, ceil(size / 8)]; null: only votes
  unsigned long long* stats;
  int majority;
  Pass pass;
};
static_assert(sizeof(MergeArguments) <= 4096 && sizeof(MasksArguments) <= 4096, "kernel arguments");

__device__ __forceinline__ float trim(float tau, float threshold) {
  return fabsf(tau) >= threshold ? tau : 0.0f;
}

// Whether positive values are selected; negative ones are elsewhere.
__device__ __forceinline__ bool elects_positive(float sum, int majority) {
  return majority > 0 ? sum >= 0.0f || sum != sum : sum > 0.0f;
}

// The majority that a launch works with, once called by all threads of the block. In shared memory,
// because a register of its own makes kernels spill or lowers their occupancy.
template <class Arguments>
__device__ __forceinline__ const int& majority_of(const Arguments& p) {
  __shared__ int majority;
  if (threadIdx.x == 0) {
    majority = p.majority;
    if (p.pass != Pass::kVote) {
      long long signs = static_cast<long long>(p.stats[0]);
      majority = p.stats[1] == 0 ? 0 : int(signs > 0) - int(signs < 0);
    }
  }
  __syncthreads();
  return majority;
}

// A thread's share of the election's statistics.
struct Votes {
  long long signs = 0;
  long long cancelled = 0;

  __device__ __forceinline__ void add(float sum, bool any_kept) {
    signs += int(sum > 0.0f) - int(sum < 0.0f);
    cancelled += int(sum == 0.0f && any_kept);
  }

  // Called once by all threads of the block.
  __device__ __forceinline__ void add_to(unsigned long long* stats) const {
    __shared__ long long shared[2][kThreads / kWarp];
    long long total[2] = {signs, cancelled};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int step = kWarp / 2; step >= 1; step /= 2) {
        total[s] += __shfl_xor_sync(0xffffffffu, total[s], step);
      }
      if (threadIdx.x % kWarp == 0) shared[s][threadIdx.x / kWarp] = total[s];
    }
    __syncthreads();
    if (threadIdx.x >= 2) return;
    long long sum = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[threadIdx.x][w];
    if (sum != 0) atomicAdd(&stats[threadIdx.x], static_cast<unsigned long long>(sum));
  }
};

template <int kDtype, bool kExperts, int kWidth, Merge kMerge>
__device__ __forceinline__ Floats<kWidth> merge(const MergeArguments& p, int64_t i,
                                                const int& majority, Votes& votes) {
  const TensorTable& table = p.table;
  const TableRow& row = table.rows[0];
  Bits<kWidth> bits[kGroup], base_bits = {};
  if (kExperts || p.add_base) base_bits = load_base<kWidth>(row.base, i, table.base_dtype);
  float thresholds[kGroup];
  load_scalars(thresholds, p.thresholds, 0, table.k);
  load_group<kDtype>(bits, table.deltas, 0, table.k, i);
  Floats<kWidth> base = to_floats(base_bits, table.base_dtype);
  Floats<kWidth> sum = {}, positive = {}, negative = {}, positive_count = {}, negative_count = {};
  for (int first = 0; first < table.k; first += kGroup) {
    if (first > 0) {
      load_scalars(thresholds, p.thresholds, first, table.k);
      load_group<kDtype>(bits, table.deltas, first, table.k, i);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (first + j >= table.k) continue;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        float x = trim(task_vector<kDtype, kExperts>(bits[j], base, v), thresholds[j]);
        bool up = x > 0.0f, down = x < 0.0f;
        sum.lane[v] = sum.lane[v] + x;
        if constexpr (kMerge == Merge::kMax) {
          if (x > positive.lane[v]) positive.lane[v] = x;
          if (x < negative.lane[v]) negative.lane[v] = x;
        } else {
          if (up) positive.lane[v] = positive.lane[v] + x;
          if (down) negative.lane[v] = negative.lane[v] + x;
        }
        if constexpr (kMerge == Merge::kMean) {
          if (up) positive_count.lane[v] += 1.0f;
          if (down) negative_count.lane[v] += 1.0f;
        }
      }
    }
  }
  Floats<kWidth> merged;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    float s = sum.lane[v];
    votes.add(s, positive.lane[v] > 0.0f || negative.lane[v] < 0.0f);
    bool up = elects_positive(s, majority);
    float m = up ? positive.lane[v] : negative.lane[v];
    if constexpr (kMerge == Merge::kMean) {
      float count = up ? positive_count.lane[v] : negative_count.lane[v];
      m = m / (count > 1.0f ? count : 1.0f);
    }
    if constexpr (kMerge == Merge::kMax) {
      if (majority == 0 && !(s > 0.0f || s < 0.0f)) m = 0.0f;
    }
    m = m * p.scaling;
    merged.lane[v] = p.add_base ? m + base.lane[v] : m;
  }
  return merged;
}

template <int kDtype, bool kExperts, int kWidth, Merge kMerge>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArguments p) {
  const TableRow& row = p.table.rows[0];
  const int& majority = majority_of(p);
  if (p.pass == Pass::kCorrect && majority == 0) return;
  Votes votes;
  const int64_t step = int64_t(gridDim.x) * kThreads * kWidth;
  int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  for (; i < row.size; i += step) {
    store(row.out, i, merge<kDtype, kExperts, kWidth, kMerge>(p, i, majority, votes),
          p.table.out_dtype);
  }
  if (p.pass == Pass::kVote) votes.add_to(p.stats);
}

constexpr int kByte = 8;

// The first n of the kByte elements from i on, the others zero; kVectors promises all of them.
template <int kDtype, bool kVectors>
__device__ __forceinline__ Floats<kByte> load_byte(const void* data, int64_t i, int n) {
  if constexpr (kVectors) return to_floats(load_bits<kDtype, kByte>(data, i), kDtype);
  Floats<kByte> r = {};
#pragma unroll
  for (int v = 0; v < kByte; ++v) {
    if (v < n) r.lane[v] = element(load_bits<kDtype, 1>(data, i + v), 0, kDtype);
  }
  return r;
}

// Eight entries of all K deltas: one byte of each mask.
template <int kDtype, bool kExperts, bool kVectors>
__device__ __forceinline__ void mask_byte(const MasksArguments& p, int64_t i, const int& majority,
                                          Votes& votes) {
  const TensorTable& table = p.table;
  const TableRow& row = table.rows[0];
  const int n = row.size - i < kByte ? int(row.size - i) : kByte;
  const int64_t row_bytes = (row.size + kByte - 1) / kByte;
  Floats<kByte> base = {}, sum = {};
  if constexpr (kExperts) {
    if (table.base_dtype == kFloat32) {
      base = load_byte<kFloat32, kVectors>(row.base, i, n);
    } else if (table.base_dtype == kFloat16) {
      base = load_byte<kFloat16, kVectors>(row.base, i, n);
    } else {
      base = load_byte<kBFloat16, kVectors>(row.base, i, n);
    }
  }
  uint32_t any = 0, up = 0;
#pragma unroll(kVectors ? 2 : 1)
  for (int k = 0; k < table.k; ++k) {
    Floats<kByte> delta = load_byte<kDtype, kVectors>(table.deltas[k], i, n);
    float threshold = __ldg(p.thresholds + k);
#pragma unroll
    for (int v = 0; v < kByte; ++v) {
      float x = trim(kExperts ? delta.lane[v] - base.lane[v] : delta.lane[v], threshold);
      sum.lane[v] = sum.lane[v] + x;
      any |= uint32_t(x != 0.0f) << v;
    }
  }
#pragma unroll
  for (int v = 0; v < kByte; ++v) {
    votes.add(sum.lane[v], any >> v & 1u);
    up |= uint32_t(elects_positive(sum.lane[v], majority)) << v;
  }
  if (p.masks == nullptr) return;
  // The second read of the deltas comes from a cache.
#pragma unroll(kVectors ? 2 : 1)
  for (int k = 0; k < table.k; ++k) {
    Floats<kByte> delta = load_byte<kDtype, kVectors>(table.deltas[k], i, n);
    float threshold = __ldg(p.thresholds + k);
    uint32_t positive = 0, negative = 0;
#pragma unroll
    for (int v = 0; v < kByte; ++v) {
      float x = trim(kExperts ? delta.lane[v] - base.lane[v] : delta.lane[v], threshold);
      positive |= uint32_t(x > 0.0f) << v;
      negative |= uint32_t(x < 0.0f) << v;
    }
    p.masks[k * row_bytes + i / kByte] = uint8_t((positive & up) | (negative & ~up));
  }
}

template <int kDtype, bool kExperts, int kWidth>
__global__ void __launch_bounds__(kThreads) masks_kernel(const __grid_constant__ MasksArguments p) {
  const int& majority = majority_of(p);
  if (p.pass == Pass::kCorrect && majority == 0) return;
  Votes votes;
  const int64_t step = int64_t(gridDim.x) * kThreads * kByte;
  int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kByte;
  for (; i < p.table.rows[0].size; i += step) {
    mask_byte<kDtype, kExperts, (kWidth > 1)>(p, i, majority, votes);
  }
  if (p.pass == Pass::kVote) votes.add_to(p.stats);
}

int64_t blocks_for(int64_t size, int width) {
  int64_t per_block = int64_t(kThreads) * width;
  return (size + per_block - 1) / per_block;
}

bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  return first < second + uintptr_t(b_bytes) && second < first + uintptr_t(a_bytes);
}

cudaError_t merge_pass(const TiesMergeParams& p, Pass pass, int majority, cudaStream_t stream) {
  MergeArguments arguments = {single_table(p.tensors, p.out, p.out_dtype),
                              p.thresholds,
                              p.stats,
                              p.scaling,
                              majority,
                              pass,
                              p.add_base};
  int64_t size = p.tensors.sizes[0], most = int64_t(p.multiprocessors) * kBlocksPerMultiprocessor;
  bool vectors = has_vectors(p.tensors, 0, full_width(p.tensors.delta_dtype), nullptr, p.out);
  auto launch_kernel = [&](auto dtype, auto experts, auto width) {
    constexpr int kDtype = decltype(dtype)::value, kWidth = decltype(width)::value;
    constexpr bool kExperts = decltype(experts)::value;
    auto run = [&](void (*kernel)(MergeArguments)) {
      return launch(kernel, blocks_for(size, kWidth), most, kThreads, arguments, stream);
    };
    if (p.merge == Merge::kMean) return run(merge_kernel<kDtype, kExperts, kWidth, Merge::kMean>);
    if (p.merge == Merge::kSum) return run(merge_kernel<kDtype, kExperts, kWidth, Merge::kSum>);
    return run(merge_kernel<kDtype, kExperts, kWidth, Merge::kMax>);
  };
  return with_source(p.tensors.delta_dtype, p.tensors.experts, vectors, launch_kernel);
}

cudaError_t masks_pass(const TiesMasksParams& p, Pass pass, int majority, cudaStream_t stream) {
  MasksArguments arguments = {
      single_table(p.tensors, nullptr, kFloat32), p.thresholds, p.masks, p.stats, majority, pass};
  int64_t size = p.tensors.sizes[0], most = int64_t(p.multiprocessors) * kBlocksPerMultiprocessor;
  bool vectors = has_vectors(p.tensors, 0, kByte, nullptr, nullptr);
  auto launch_kernel = [&](auto dtype, auto experts, auto width) {
    return launch(
        masks_kernel<decltype(dtype)::value, decltype(experts)::value, decltype(width)::value>,
        blocks_for(size, kByte), most, kThreads, arguments, stream);
  };
  return with_source(p.tensors.delta_dtype, p.tensors.experts, vectors, launch_kernel);
}

}  // namespace

cudaError_t ties_merge(TiesMergeParams p, cudaStream_t stream) {
  if (p.tensors.count != 1 || p.tensors.k > kMaxDeltas) return cudaErrorInvalidValue;
  cudaError_t error = cudaMemsetAsync(p.stats, 0, 2 * sizeof(*p.stats), stream);
  if (error != cudaSuccess) return error;
  if (p.majority != kOwnMajority) return merge_pass(p, Pass::kVote, p.majority, stream);
  int64_t size = p.tensors.sizes[0];
  if (overlap(p.out, size * item_bytes(p.out_dtype), p.tensors.bases[0],
              size * item_bytes(p.tensors.base_dtype))) {
    // A first merge would overwrite the base that the second one reads.
    TiesMasksParams votes = {p.tensors, p.thresholds, nullptr, p.stats, 0, p.multiprocessors};
    error = masks_pass(votes, Pass::kVote, 0, stream);
    return error != cudaSuccess ? error : merge_pass(p, Pass::kWrite, 0, stream);
  }
  error = merge_pass(p, Pass::kVote, 0, stream);
  return error != cudaSuccess ? error : merge_pass(p, Pass::kCorrect, 0, stream);
}

cudaError_t ties_masks(TiesMasksParams p, cudaStream_t stream) {
  if (p.tensors.count != 1 || p.tensors.k > kMaxDeltas) return cudaErrorInvalidValue;
  cudaError_t error = cudaMemsetAsync(p.stats, 0, 2 * sizeof(*p.stats), stream);
  if (error != cudaSuccess) return error;
  if (p.majority != kOwnMajority) return masks_pass(p, Pass::kVote, p.majority, stream);
  error = masks_pass(p, Pass::kVote, 0, stream);
  return error != cudaSuccess ? error : masks_pass(p, Pass::kCorrect, 0, stream);
}

}  // namespace fastmerge::cuda
