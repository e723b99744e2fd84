// outs[g] = base + sum_k lambda_gk tau_k and dots[g, k] = <G_g, tau_k> for G rows of coefficients.
//
// Task vectors are read once per tile, kept in fp32 in the first-level cache, and then serve all
// rows of coefficients. The sums have the additions of weighted_sum, without the terms whose
// coefficient is zero. Products are summed in sixteen fp32 lanes per block, the blocks in fp64
// in order.
#include <omp.h>

#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Writes base and the task vectors of n entries of one row to a tile [K + 1, step] from `offset`
// on, and up to kLanes - 1 zeros behind them.
template <int kDtype, int kExperts>
inline void read_row(const Source& s, int64_t begin, int64_t n, int64_t step, int64_t offset,
                     float* tile) {
  for (int64_t i = 0; i < n; i += kLanes) {
    int64_t left = n - i < kLanes ? n - i : kLanes;
    bool whole = left == kLanes;
    F32 base = whole ? load_base(s, begin + i) : load_base_first(s, begin + i, left);
    store<kFloat32>(tile, offset + i, base);
    for (int64_t k = 0; k < s.k; ++k) {
      F32 tau = whole ? load_tau<kDtype, kExperts>(s, k, begin + i, base)
                      : load_tau_first<kDtype, kExperts>(s, k, begin + i, left, base);
      store<kFloat32>(tile, (k + 1) * step + offset + i, tau);
    }
  }
}

// Adds kCount terms to the sums of a tile: from `sums` to `out`.
template <int kCount, int kOut>
inline void combine_group(const float* const* taus, const float* coefficients, int64_t n,
                          const float* sums, void* out, int64_t begin) {
  F32 lambda[kCount == 0 ? 1 : kCount];
  _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) lambda[j] = broadcast(coefficients[j]);
  for (int64_t i = 0; i < n; i += kLanes) {
    F32 sum = load<kFloat32>(sums, i);
    _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) {
      sum = sum + lambda[j] * load<kFloat32>(taus[j], i);
    }
    if (n - i >= kLanes) {
      store<kOut>(out, begin + i, sum);
    } else {
      store_first<kOut>(out, begin + i, sum, n - i);
    }
  }
}

template <int kCount>
inline void combine_some(const float* const* taus, const float* coefficients, int64_t n,
                         const float* sums, void* out, int out_dtype, int64_t begin) {
  with_dtype(out_dtype, [&](auto dtype) {
    combine_group<kCount, decltype(dtype)::value>(taus, coefficients, n, sums, out, begin);
  });
}

// The terms of one row of coefficients, up to eight at a time; `sums` holds what later ones need.
inline void combine_tile(const float* tile, int64_t step, int64_t n, const float* coefficients,
                         int64_t count, float* sums, void* out, int out_dtype, int64_t begin) {
  const float* taus[8];
  float lambda[8];
  const float* from = tile;
  int64_t k = 0;
  for (;;) {
    int found = 0;
    for (; k < count && found < 8; ++k) {
      if (coefficients[k] == 0.0f) continue;
      taus[found] = tile + (k + 1) * step;
      lambda[found++] = coefficients[k];
    }
    if (found == 8) {
      while (k < count && coefficients[k] == 0.0f) ++k;
      if (k == count) return combine_some<8>(taus, lambda, n, from, out, out_dtype, begin);
      combine_group<8, kFloat32>(taus, lambda, (n + kLanes - 1) / kLanes * kLanes, from, sums, 0);
      from = sums;
      continue;
    }
    switch (found) {
      case 0:
        return combine_some<0>(taus, lambda, n, from, out, out_dtype, begin);
      case 1:
        return combine_some<1>(taus, lambda, n, from, out, out_dtype, begin);
      case 2:
        return combine_some<2>(taus, lambda, n, from, out, out_dtype, begin);
      case 3:
        return combine_some<3>(taus, lambda, n, from, out, out_dtype, begin);
      case 4:
        return combine_some<4>(taus, lambda, n, from, out, out_dtype, begin);
      case 5:
        return combine_some<5>(taus, lambda, n, from, out, out_dtype, begin);
      case 6:
        return combine_some<6>(taus, lambda, n, from, out, out_dtype, begin);
      default:
        return combine_some<7>(taus, lambda, n, from, out, out_dtype, begin);
    }
  }
}

// Adds the products of kCount task vectors with the gradient to their lanes.
template <int kCount, int kGrad>
inline void dot_group(const float* taus, int64_t step, int64_t n, const void* grad, int64_t begin,
                      float* lanes) {
  F32 sums[kCount];
  _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) {
    sums[j] = load<kFloat32>(lanes, j * kLanes);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    bool whole = n - i >= kLanes;
    F32 g = whole ? load<kGrad>(grad, begin + i) : load_first<kGrad>(grad, begin + i, n - i);
    _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) {
      sums[j] = sums[j] + g * load<kFloat32>(taus + j * step, i);
    }
  }
  _Pragma("GCC unroll 8") for (int j = 0; j < kCount; ++j) {
    memcpy(lanes + j * kLanes, &sums[j], sizeof(F32));
  }
}

template <int kGrad>
inline void dot_tile(const float* taus, int64_t step, int64_t n, int64_t count, const void* grad,
                     int64_t begin, float* lanes) {
  int64_t k = 0;
  for (; count - k >= 8; k += 8) {
    dot_group<8, kGrad>(taus + k * step, step, n, grad, begin, lanes + k * kLanes);
  }
  for (; count - k >= 4; k += 4) {
    dot_group<4, kGrad>(taus + k * step, step, n, grad, begin, lanes + k * kLanes);
  }
  for (; k < count; ++k) {
    dot_group<1, kGrad>(taus + k * step, step, n, grad, begin, lanes + k * kLanes);
  }
}

// Writes entries [begin, begin + n) of the rows, counted without the gaps between them, to a tile.
template <int kDtype, int kExperts>
inline void read_tile(const CombineRowsParams& p, int64_t begin, int64_t n, int64_t step,
                      float* tile) {
  int64_t row = begin / p.width, column = begin % p.width;
  for (int64_t done = 0; done < n; ++row, column = 0) {
    int64_t left = p.width - column < n - done ? p.width - column : n - done;
    read_row<kDtype, kExperts>(p.source, row * p.stride + column, left, step, done, tile);
    done += left;
  }
  // A last vector may reach past the rows that were read.
  for (int64_t k = 0; k <= p.source.k; ++k) store<kFloat32>(tile, k * step + n, zeros());
}

template <int kDtype, int kExperts>
inline void combine_block(const CombineRowsParams& p, int64_t begin, int64_t end, float* scratch,
                          double* partial) {
  int64_t count = p.source.k, entries = combine_rows_tile(count), step = entries + kLanes;
  int64_t size = p.rows * p.width;
  float* tile = scratch;
  float* sums = scratch + (count + 1) * step;
  float* lanes = sums + step;  // [G, K, kLanes]
  if (p.grad != nullptr) memset(lanes, 0, p.groups * count * kLanes * sizeof(float));
  for (; begin < end; begin += entries) {
    int64_t n = end - begin < entries ? end - begin : entries;
    read_tile<kDtype, kExperts>(p, begin, n, step, tile);
    for (int64_t g = 0; g < p.groups; ++g) {
      int64_t first = g * size + begin;
      if (p.out != nullptr) {
        combine_tile(tile, step, n, p.coefficients + g * count, count, sums, p.out, p.out_dtype,
                     first);
      }
      if (p.grad != nullptr) {
        with_dtype(p.grad_dtype, [&](auto dtype) {
          dot_tile<decltype(dtype)::value>(tile + step, step, n, count, p.grad, first,
                                           lanes + g * count * kLanes);
        });
      }
    }
  }
  if (p.grad == nullptr) return;
  for (int64_t j = 0; j < p.groups * count; ++j) {
    F32 sum;
    memcpy(&sum, lanes + j * kLanes, sizeof(sum));
    partial[j] = fold(sum);
  }
}

}  // namespace

void combine_rows(const CombineRowsParams& p) {
  int64_t count = p.source.k, results = p.groups * count, size = p.rows * p.width;
  int64_t blocks = block_count(size);
  int team = team_size(size * p.groups, p.threads);
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    parallel_runs(blocks, team, [&](int64_t first, int64_t last) {
      int64_t thread = team > 1 ? omp_get_thread_num() : 0;
      float* scratch = p.scratch + thread * combine_rows_scratch(count, p.groups);
      for (int64_t b = first; b < last; ++b) {
        int64_t end = (b + 1) * kBlock < size ? (b + 1) * kBlock : size;
        combine_block<kDtype, kExperts>(p, b * kBlock, end, scratch, p.partials + b * results);
      }
    });
  });
  if (p.grad != nullptr) sum_partials(p.partials, blocks, results, p.dots);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
