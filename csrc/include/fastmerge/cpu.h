// Parameters of the CPU kernels and the table through which they are reached.
//
// Pointers need only the alignment of their element type. Nothing here allocates or throws; every
// check of a size, dtype or alias belongs to the caller. `threads` is an upper bound: small inputs
// run on the calling thread. Arithmetic is fp32 multiply and add without contraction, so results
// have the same bytes at every instruction-set level and thread count; a NaN result is always the
// positive quiet NaN.
#pragma once

#include <stdint.h>

namespace fastmerge::cpu {

// Elements of one unit of work. Fixed, so that the order of additions never depends on the
// number of threads.
constexpr int64_t kBlock = 8192;

static inline int64_t block_count(int64_t size) { return (size + kBlock - 1) / kBlock; }

// L tensors, each cut into blocks; block b of all blocks belongs to the tensor t with
// first_block[t] <= b < first_block[t + 1].
struct TensorList {
  const int64_t* sizes;        // [L]
  const int64_t* first_block;  // [L + 1]
  int64_t count;               // L
};

// Where tau_k is read: tau_k = deltas[k] - base when `experts`, else deltas[k].
// A null base stands for zeros and is allowed only without `experts`.
struct Source {
  const void* base;
  const void* const* deltas;  // [K]
  int64_t k;
  int base_dtype;
  int delta_dtype;
  bool experts;
};

// out = base + sum_k coefficients[k] * tau_k for every tensor; out may be base itself.
struct WeightedSumParams {
  TensorList tensors;
  const void* const* bases;   // [L]
  const void* const* deltas;  // [L, K]
  const float* coefficients;  // [L, K]
  void* const* outs;          // [L]
  int64_t k;
  int base_dtype;
  int delta_dtype;
  int out_dtype;
  bool experts;
  int threads;
};

// dots[l, k] = <grads[l], tau_lk>.
struct CoefficientGradParams {
  TensorList tensors;
  const void* const* grads;   // [L]
  const void* const* bases;   // [L]
  const void* const* deltas;  // [L, K]
  double* dots;               // [L, K]
  double* scratch;            // [total blocks, K]
  int64_t k;
  int grad_dtype;
  int base_dtype;
  int delta_dtype;
  bool experts;
  int threads;
};

// out and dots of the two kernels above for one tensor, from one read of base, deltas and grad.
struct CombineAndDotParams {
  Source source;
  const float* coefficients;  // [K]
  const void* grad;
  void* out;
  double* dots;     // [K]
  double* scratch;  // [blocks, K]
  int64_t size;
  int grad_dtype;
  int out_dtype;
  int threads;
};

constexpr int64_t kHistogramBins = 65536;

// Adds to counts. With u the 31 bits of the fp32 |tau|: level 0 counts u >> 15; level 1 counts
// u & 0x7fff among the entries whose u >> 15 is `prefix`.
struct MagnitudeHistogramParams {
  const void* base;  // null without experts
  const void* delta;
  int64_t* counts;   // [kHistogramBins]
  int64_t* scratch;  // [threads, kHistogramBins]
  int64_t size;
  int64_t prefix;
  int level;
  int base_dtype;
  int delta_dtype;
  bool experts;
  int threads;
};

// How TIES joins the values that agree with the elected sign.
enum class Merge { kMean = 0, kSum = 1, kMax = 2 };

// x_k = |tau_k| >= thresholds[k] ? tau_k : 0; S = sum_k x_k; s = sign(S), or `majority` where S is
// zero or NaN; an x_k is selected when it is positive (s > 0) or negative (otherwise).
// out = scaling * merge of the selected x_k, on top of base when add_base.
// stats[0] gets the sum of sign(S), stats[1] the number of entries with S = 0 and some x_k != 0.
struct TiesMergeParams {
  Source source;
  const float* thresholds;  // [K]
  void* out;
  int64_t* stats;  // [2]
  int64_t size;
  int out_dtype;
  Merge merge;
  float scaling;
  int majority;
  bool add_base;
  int threads;
};

// Packed selections as above: entry i of delta k is bit i % 8 of masks[k, i / 8]; unused bits are
// 0.
struct TiesMasksParams {
  Source source;
  const float* thresholds;  // [K]
  uint8_t* masks;           // [K, ceil(size / 8)]
  int64_t* stats;           // [2]
  int64_t size;
  int majority;
  int threads;
};

// entropy = lse - sum_c p_c x_c and lse = log sum_c exp(x_c) of every row x, p its softmax.
struct SoftmaxEntropyParams {
  const void* logits;
  float* entropy;  // [rows]
  float* lse;      // [rows]
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int dtype;
  int threads;
};

// grad_logits = -p (log p + entropy) * grad_entropy; 0 where p = 0.
struct SoftmaxEntropyBackwardParams {
  const void* logits;
  const float* entropy;       // [rows]
  const float* lse;           // [rows]
  const float* grad_entropy;  // [rows]
  void* grad_logits;          // of the logits' dtype
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t grad_row_stride;
  int dtype;
  int threads;
};

struct KernelTable {
  void (*weighted_sum)(const WeightedSumParams&);
  void (*coefficient_grad)(const CoefficientGradParams&);
  void (*combine_and_dot)(const CombineAndDotParams&);
  void (*magnitude_histogram)(const MagnitudeHistogramParams&);
  void (*ties_merge)(const TiesMergeParams&);
  void (*ties_masks)(const TiesMasksParams&);
  void (*softmax_entropy)(const SoftmaxEntropyParams&);
  void (*softmax_entropy_backward)(const SoftmaxEntropyBackwardParams&);
};

// The chosen level's kernels. Levels are ordered from "baseline" upwards.
const KernelTable& kernels();
const char* isa();
int supported_levels();
const char* level_name(int level);
// Returns false when `name` is not a level that this build and this machine have.
bool set_isa(const char* name);

}  // namespace fastmerge::cpu
