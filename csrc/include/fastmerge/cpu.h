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

struct KernelTable {
  void (*weighted_sum)(const WeightedSumParams&);
  void (*coefficient_grad)(const CoefficientGradParams&);
  void (*combine_and_dot)(const CombineAndDotParams&);
};

// The chosen level's kernels. Levels are ordered from "baseline" upwards.
const KernelTable& kernels();
const char* isa();
int supported_levels();
const char* level_name(int level);
// Returns false when `name` is not a level that this build and this machine have.
bool set_isa(const char* name);

}  // namespace fastmerge::cpu
