// Lists of tensors as kernel arguments.
//
// A table holds up to kTableRows tensors, fewer when K is large, within the 4 KiB that every
// driver accepts. Longer lists become several launches, so nothing is uploaded and a launch can be
// captured in a CUDA graph. Tensors that cannot be read in 16-byte pieces go into tables of their
// own, whose kernels read element by element.
#pragma once

#include <stdint.h>

#include "fastmerge/cuda.h"
#include "vectors.h"

namespace fastmerge::cuda {

constexpr int kTableRows = 32;

struct TableRow {
  int64_t first_unit;   // its units of kBlock elements are counted over the table
  int64_t first_block;  // the same, counted over the whole list
  int64_t size;
  int64_t index;  // in the list
  const void* base;
  const void* grad;
  void* out;
};

struct TensorTable {
  int64_t units;
  const float* coefficients;  // [L, K]
  double* partials;           // [total blocks, K]
  double* dots;               // [L, K]
  int count;
  int k;
  int base_dtype;
  int grad_dtype;
  int out_dtype;
  TableRow rows[kTableRows];
  const void* deltas[kMaxDeltas];  // [count, K]
};
static_assert(sizeof(TensorTable) <= 4096, "kernel arguments");

// The row that holds a unit.
__device__ __forceinline__ int row_of(const TensorTable& table, int64_t unit) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (table.rows[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Constant<delta dtype>, Constant<experts>, Constant<width>).
template <class F>
cudaError_t with_source(int delta_dtype, bool experts, bool vectors, F f) {
  auto with_width = [&](auto dtype, auto is_experts) {
    if (vectors) return f(dtype, is_experts, Constant<full_width(decltype(dtype)::value)>{});
    return f(dtype, is_experts, Constant<1>{});
  };
  auto with_experts = [&](auto dtype) {
    if (experts) return with_width(dtype, Constant<1>{});
    return with_width(dtype, Constant<0>{});
  };
  if (delta_dtype == kFloat32) return with_experts(Constant<kFloat32>{});
  if (delta_dtype == kFloat16) return with_experts(Constant<kFloat16>{});
  return with_experts(Constant<kBFloat16>{});
}

// Whether tensor t, its deltas and two further addresses can be accessed in vectors of `width`.
inline bool has_vectors(const TensorList& list, int64_t t, int width, const void* grad,
                        const void* out) {
  auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  uintptr_t all = address(list.bases[t]) | address(grad) | address(out);
  for (int64_t k = 0; k < list.k; ++k) all |= address(list.deltas[t * list.k + k]);
  return all % 16 == 0 && list.sizes[t] % width == 0;
}

// The only tensor of a list as a table.
inline TensorTable single_table(const TensorList& list, void* out, int out_dtype) {
  TensorTable table = {};
  table.count = 1;
  table.k = int(list.k);
  table.base_dtype = list.base_dtype;
  table.out_dtype = out_dtype;
  table.rows[0] = {0, 0, list.sizes[0], 0, list.bases[0], nullptr, out};
  for (int64_t k = 0; k < list.k; ++k) table.deltas[k] = list.deltas[k];
  return table;
}

// Cuts a list into tables and calls run(table, vectors) for each; `common` holds what all share.
template <class Run>
cudaError_t for_each_table(const TensorList& list, const void* const* grads, void* const* outs,
                           TensorTable common, Run run) {
  if (list.k > kMaxDeltas) return cudaErrorInvalidValue;
  common.k = int(list.k);
  common.base_dtype = list.base_dtype;
  for (bool vectors : {true, false}) {
    common.count = 0;
    common.units = 0;
    int64_t first_block = 0;
    auto flush = [&] {
      if (common.count == 0) return cudaSuccess;
      cudaError_t error = run(common, vectors);
      common.count = 0;
      common.units = 0;
      return error;
    };
    for (int64_t t = 0; t < list.count; ++t) {
      int64_t blocks = block_count(list.sizes[t]);
      const void* grad = grads == nullptr ? nullptr : grads[t];
      void* out = outs == nullptr ? nullptr : outs[t];
      if (has_vectors(list, t, full_width(list.delta_dtype), grad, out) == vectors) {
        if (common.count == kTableRows || (common.count + 1) * list.k > kMaxDeltas) {
          cudaError_t error = flush();
          if (error != cudaSuccess) return error;
        }
        common.rows[common.count] = {common.units, first_block, list.sizes[t], t, list.bases[t],
                                     grad,         out};
        for (int64_t k = 0; k < list.k; ++k) {
          common.deltas[common.count * list.k + k] = list.deltas[t * list.k + k];
        }
        common.units += blocks;
        ++common.count;
      }
      first_block += blocks;
    }
    cudaError_t error = flush();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastmerge::cuda
