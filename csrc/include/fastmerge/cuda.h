// Parameters and launchers of the CUDA kernels.
//
// A launcher takes its parameters by value and a stream and returns cudaError_t. It never
// allocates, synchronises or throws, so it can be captured in a CUDA graph; checks, allocation and
// the current device belong to the caller. Arrays of addresses and sizes live on the host and are
// read before the launcher returns; everything they point to, coefficients, thresholds, results
// and scratch live on the device. Data needs only the alignment of its element type; addresses
// that are multiples of 16 bytes run faster.
//
// Arithmetic, blocks and the order of additions are those of the CPU kernels: the same bytes for
// any launch configuration, device and run.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace fastmerge::cuda {

// Elements of one unit of work, as on the CPU.
constexpr int64_t kBlock = 8192;

static inline int64_t block_count(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Most deltas of one tensor: their addresses travel in the 4 KiB of kernel arguments.
constexpr int64_t kMaxDeltas = 256;

// arch[0] = the architecture whose code runs on the current device, e.g. 900.
struct ProbeParams {
  int32_t* arch;  // [1], on the device
};

// L tensors and their K deltas each; tau_lk = deltas[l, k] - bases[l] when `experts`, else
// deltas[l, k]. A null base stands for zeros and is allowed only without `experts`.
struct TensorList {
  const int64_t* sizes;       // [L]
  const void* const* bases;   // [L]
  const void* const* deltas;  // [L, K]
  int64_t count;              // L
  int64_t k;                  // K
  int base_dtype;
  int delta_dtype;
  bool experts;
};

// outs[l] = bases[l] + sum_k coefficients[l, k] * tau_lk; outs[l] may be bases[l].
struct WeightedSumParams {
  TensorList tensors;
  const float* coefficients;  // [L, K]
  void* const* outs;          // [L]
  int out_dtype;
  int multiprocessors;
};

// dots[l, k] = <grads[l], tau_lk>.
struct CoefficientGradParams {
  TensorList tensors;
  const void* const* grads;  // [L]
  double* dots;              // [L, K]
  double* scratch;           // [total blocks, K]
  int grad_dtype;
  int multiprocessors;
};

// outs and dots of the two kernels above; outs[l] may be bases[l] but not grads[l]. Reads its
// inputs once for K <= 32 and twice for more.
struct CombineAndDotParams {
  TensorList tensors;
  const float* coefficients;  // [L, K]
  const void* const* grads;   // [L]
  void* const* outs;          // [L]
  double* dots;               // [L, K]
  double* scratch;            // [total blocks, K]
  int grad_dtype;
  int out_dtype;
  int multiprocessors;
};

constexpr int64_t kHistogramBins = 65536;

// Adds to counts. With u the 31 bits of the fp32 |tau|: level 0 counts u >> 15; level 1 counts
// u & 0x7fff among the entries whose u >> 15 is `prefix`.
struct MagnitudeHistogramParams {
  const void* base;  // null without experts
  const void* delta;
  unsigned long long* counts;  // [kHistogramBins]
  const int64_t* bits;         // [1], the prefix on the device; null: `prefix` holds it
  int64_t size;
  int64_t prefix;
  int level;
  int base_dtype;
  int delta_dtype;
  bool experts;
  int multiprocessors;
};

// Descends one level: with `bits` the high bits found so far and `position` >= 1 a rank from the
// smallest among the magnitudes counted, appends the level's bits of that magnitude to bits[0] and
// leaves in position[0] the rank among the magnitudes with these. bits[0] = 0 if none was counted.
struct MagnitudeRefineParams {
  const unsigned long long* counts;  // [kHistogramBins]
  int64_t* bits;                     // [1]
  int64_t* position;                 // [1]
  int level;
};

// A `majority` of TIES found by the tensor's own election: sign(stats[0]) if stats[1] > 0, else 0.
// It stays on the device.
constexpr int kOwnMajority = 2;

// How TIES joins the values that agree with the elected sign.
enum class Merge { kMean = 0, kSum = 1, kMax = 2 };

// x_k = |tau_k| >= thresholds[k] ? tau_k : 0; S = sum_k x_k; s = sign(S), or `majority` where S is
// zero or NaN; an x_k is selected when it is positive (s > 0) or negative (otherwise).
// out = scaling * merge of the selected x_k, on top of base when add_base; out may be base.
// stats[0] gets the sum of sign(S), stats[1] the number of entries with S = 0 and some x_k != 0.
struct TiesMergeParams {
  TensorList tensors;       // L = 1
  const float* thresholds;  // [K]
  void* out;
  unsigned long long* stats;  // [2], two's complement
  int out_dtype;
  Merge merge;
  float scaling;
  int majority;  // -1, 0, 1 or kOwnMajority
  bool add_base;
  int multiprocessors;
};

// Packed selections as above: entry i of delta k is bit i % 8 of masks[k, i / 8]; unused bits are
// 0.
struct TiesMasksParams {
  TensorList tensors;         // L = 1
  const float* thresholds;    // [K]
  uint8_t* masks;             // [K, ceil(size / 8)]
  unsigned long long* stats;  // [2], two's complement
  int majority;               // -1, 0, 1 or kOwnMajority
  int multiprocessors;
};

// total = sum_k tau_k, a NaN taken as 0; unified = the largest tau_k where total > 0, else the
// smallest, 0 if none has that sign, and 0 where total = 0 with `leave_out`. masks: whether tau_k
// has the sign of unified, entry i of a row in bit i % 8 of its byte i / 8; unused bits are 0. Rows
// that fill their bytes count as one. magnitudes[0, k] = sum of |tau_k|, magnitudes[1, k] = sum of
// the stored |unified| where the mask is set. Reads the deltas once for K <= 8, else twice.
struct ElectParams {
  TensorList tensors;  // L = 1
  void* unified;
  uint8_t* masks;      // [K, rows, ceil(columns / 8)]
  double* magnitudes;  // [2, K]
  double* scratch;     // [mask_blocks(rows, columns), 2, K]
  int64_t rows;
  int64_t columns;
  int unified_dtype;
  bool leave_out;
  int multiprocessors;
};

// Blocks in which rows of packed masks are worked on.
static inline int64_t mask_blocks(int64_t rows, int64_t columns) {
  return columns % 8 == 0 ? block_count(rows * columns) : rows * block_count(columns);
}

// out = base + sum_k coefficients[k] * (unified where masks[k]) and dots[k] = <grad, unified where
// masks[k]>. A null base stands for zeros; out may be base; a null out or grad: not that result.
// Without grad a coefficient of 0 leaves its mask out. Masks are packed as `elect` writes them.
struct MaskedCombineParams {
  const void* base;
  const void* unified;
  const uint8_t* const* masks;  // [K], each [rows, ceil(columns / 8)]
  const float* coefficients;    // [K], null without out
  void* out;
  const void* grad;
  double* dots;     // [K]
  double* scratch;  // [mask_blocks(rows, columns), K]
  int64_t k;
  int64_t rows;
  int64_t columns;
  int base_dtype;
  int unified_dtype;
  int out_dtype;
  int grad_dtype;
  int multiprocessors;
};

cudaError_t weighted_sum(WeightedSumParams params, cudaStream_t stream);
cudaError_t coefficient_grad(CoefficientGradParams params, cudaStream_t stream);
cudaError_t combine_and_dot(CombineAndDotParams params, cudaStream_t stream);
cudaError_t magnitude_histogram(MagnitudeHistogramParams params, cudaStream_t stream);
cudaError_t magnitude_refine(MagnitudeRefineParams params, cudaStream_t stream);
cudaError_t ties_merge(TiesMergeParams params, cudaStream_t stream);
cudaError_t ties_masks(TiesMasksParams params, cudaStream_t stream);
cudaError_t elect(ElectParams params, cudaStream_t stream);
cudaError_t masked_combine(MaskedCombineParams params, cudaStream_t stream);
cudaError_t probe(ProbeParams params, cudaStream_t stream);

// Whether the binary holds code for the current device; needs no launch.
cudaError_t has_device_code();

}  // namespace fastmerge::cuda
