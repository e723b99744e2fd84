// Masked task vectors: their merge with an election of signs, and their sums along rows.
//
// Contiguous tensors; out and sums are overwritten, out may be base. The merge adds in fp32 in the
// order of k; the sums in fp64, sixteen lanes from the start of each row, folded in one order.
#include "combine.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "wide.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

template <int kDtype, int kExperts, bool kElect, bool kNormalize>
FASTMERGE_INLINE F32 merge_vector(const MaskedMergeParams& p, int64_t i, int64_t n) {
  const Source& s = p.source;
  F32 base = s.base == nullptr ? zeros() : n == kLanes ? load_base(s, i) : load_base_first(s, i, n);
  F32 votes = zeros(), positive = zeros(), negative = zeros();
  F32 positive_weight = zeros(), negative_weight = zeros();
  for (int64_t k = 0; k < s.k; ++k) {
    F32 x = n == kLanes ? load_tau<kDtype, kExperts>(s, k, i, base)
                        : load_tau_first<kDtype, kExperts>(s, k, i, n, base);
    if (p.masks != nullptr) {
      x = select(load_mask(p.masks + k * p.mask_stride, p.size, i), x, zeros());
    }
    F32 value = broadcast(p.factors[s.k + k]) * x;
    if constexpr (!kElect) {
      positive = positive + value;
    } else {
      F32 vote = broadcast(p.factors[k]) * x;
      Mask up = vote > zeros(), down = vote < zeros();
      votes = votes + vote;
      positive = positive + select(up, value, zeros());
      negative = negative + select(down, value, zeros());
      if constexpr (kNormalize) {
        F32 weight = broadcast(p.factors[2 * s.k + k]);
        positive_weight = positive_weight + select(up, weight, zeros());
        negative_weight = negative_weight + select(down, weight, zeros());
      }
    }
  }
  F32 merged = positive;
  if constexpr (kElect) {
    Mask up = votes >= zeros();
    merged = select(up, positive, negative);
    if constexpr (kNormalize) {
      F32 weight = select(up, positive_weight, negative_weight), least = broadcast(p.least);
      if (p.least > 0) weight = select(weight > least, weight, least);
      merged = merged / select(weight == zeros(), broadcast(1.0f), weight);
    }
  }
  merged = merged * broadcast(p.scaling);
  return p.add_base ? base + merged : merged;
}

template <int kDtype, int kExperts, bool kElect, bool kNormalize>
void merge_all(const MaskedMergeParams& p) {
  int64_t first_block[2] = {0, block_count(p.size)};
  TensorList tensors = {&p.size, first_block, 1};
  for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      store(p.out, i, merge_vector<kDtype, kExperts, kElect, kNormalize>(p, i, kLanes),
            p.out_dtype);
    }
    if (i < end) {
      F32 merged = merge_vector<kDtype, kExperts, kElect, kNormalize>(p, i, end - i);
      store_first(p.out, i, merged, end - i, p.out_dtype);
    }
  });
}

template <int kDtype, int kExperts>
void sum_row(const MaskedSumsParams& p, int64_t row, int64_t k) {
  const Source& s = p.source;
  F64 all = {}, kept = {};
  int64_t i = row * p.width, end = i + p.width;
  auto add = [&](F32 tau) {
    F32 x = absolute(tau), masked = x;
    if (p.masks != nullptr) {
      masked = select(load_mask(p.masks + k * p.mask_stride, p.size, i), x, zeros());
    }
    F64 wide = widen(x), wide_masked = widen(masked);
    if (p.square) {
      wide = wide * wide;
      wide_masked = wide_masked * wide_masked;
    }
    all = all + wide;
    kept = kept + wide_masked;
  };
  for (; i + kLanes <= end; i += kLanes) {
    add(load_tau<kDtype, kExperts>(s, k, i, kExperts ? load_base(s, i) : zeros()));
  }
  if (i < end) {
    int64_t n = end - i;
    F32 base = kExperts ? load_base_first(s, i, n) : zeros();
    add(load_tau_first<kDtype, kExperts>(s, k, i, n, base));
  }
  double* out = p.sums + row * 2 * s.k;
  out[k] = fold(all);
  out[s.k + k] = fold(kept);
}

}  // namespace

void masked_merge(const MaskedMergeParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    if (!p.elect) {
      merge_all<kDtype, kExperts, false, false>(p);
    } else if (!p.normalize) {
      merge_all<kDtype, kExperts, true, false>(p);
    } else {
      merge_all<kDtype, kExperts, true, true>(p);
    }
  });
}

void masked_sums(const MaskedSumsParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    int64_t rows = p.width > 0 ? p.size / p.width : 0;
    parallel_runs(rows, team_size(p.size, p.threads), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t k = 0; k < p.source.k; ++k) {
          sum_row<decltype(dtype)::value, decltype(experts)::value>(p, row, k);
        }
      }
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
