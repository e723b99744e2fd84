// TIES: trim by given thresholds, elect a sign per entry, merge what agrees with it.
//
// Contiguous tensors; out and masks are overwritten, stats is overwritten. Sums are fp32 in order
// of k. A NaN is below every threshold, hence trimmed. Positive and negative values are summed
// side by side, so the merge needs a single pass over the deltas for any K.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

FASTMERGE_INLINE F32 trim(F32 tau, F32 threshold) {
  return select(absolute(tau) >= threshold, tau, zeros());
}

// Sums of the election over a block; lanes count to 512 at most, exactly.
struct Votes {
  F32 signs = zeros();
  F32 cancelled = zeros();

  FASTMERGE_INLINE void add(F32 sum, Mask any_kept) {
    F32 one = broadcast(1.0f);
    signs = signs + select(sum > zeros(), one, select(sum < zeros(), zeros() - one, zeros()));
    cancelled = cancelled + select((sum == zeros()) & any_kept, one, zeros());
  }

  FASTMERGE_INLINE void add_to(int64_t* stats) const {
    __atomic_fetch_add(&stats[0], int64_t(fold(signs)), __ATOMIC_RELAXED);
    __atomic_fetch_add(&stats[1], int64_t(fold(cancelled)), __ATOMIC_RELAXED);
  }
};

// The elected sign as a mask: where positive values are selected; negative ones elsewhere.
FASTMERGE_INLINE Mask elects_positive(F32 sum, int majority) {
  return majority > 0 ? (sum >= zeros()) | (sum != sum) : sum > zeros();
}

template <int kDtype, int kExperts, Merge kMerge>
FASTMERGE_INLINE F32 merge_vector(const TiesMergeParams& p, int64_t i, int64_t n, F32 base,
                                  Votes& votes) {
  const Source& s = p.source;
  F32 sum = zeros(), positive = zeros(), negative = zeros();
  F32 positive_count = zeros(), negative_count = zeros(), one = broadcast(1.0f);
  for (int64_t k = 0; k < s.k; ++k) {
    F32 tau = n == kLanes ? load_tau<kDtype, kExperts>(s, k, i, base)
                          : load_tau_first<kDtype, kExperts>(s, k, i, n, base);
    F32 x = trim(tau, broadcast(p.thresholds[k]));
    Mask up = x > zeros(), down = x < zeros();
    sum = sum + x;
    if constexpr (kMerge == Merge::kMax) {
      positive = select(x > positive, x, positive);
      negative = select(x < negative, x, negative);
    } else {
      positive = positive + select(up, x, zeros());
      negative = negative + select(down, x, zeros());
    }
    if constexpr (kMerge == Merge::kMean) {
      positive_count = positive_count + select(up, one, zeros());
      negative_count = negative_count + select(down, one, zeros());
    }
  }
  votes.add(sum, (positive > zeros()) | (negative < zeros()));
  Mask up = elects_positive(sum, p.majority);
  F32 merged = select(up, positive, negative);
  if constexpr (kMerge == Merge::kMean) {
    F32 count = select(up, positive_count, negative_count);
    merged = merged / select(count > one, count, one);
  }
  if constexpr (kMerge == Merge::kMax) {
    if (p.majority == 0) merged = select((sum > zeros()) | (sum < zeros()), merged, zeros());
  }
  merged = merged * broadcast(p.scaling);
  if (!p.add_base) return merged;
  if (kExperts) return base + merged;
  return merged + (n == kLanes ? load_base(s, i) : load_base_first(s, i, n));
}

template <int kDtype, int kExperts, Merge kMerge>
void merge_all(const TiesMergeParams& p) {
  int64_t first_block[2] = {0, block_count(p.size)};
  TensorList tensors = {&p.size, first_block, 1};
  for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    Votes votes;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      F32 base = kExperts ? load_base(p.source, i) : zeros();
      F32 merged = merge_vector<kDtype, kExperts, kMerge>(p, i, kLanes, base, votes);
      store(p.out, i, merged, p.out_dtype);
    }
    if (i < end) {
      F32 base = kExperts ? load_base_first(p.source, i, end - i) : zeros();
      F32 merged = merge_vector<kDtype, kExperts, kMerge>(p, i, end - i, base, votes);
      store_first(p.out, i, merged, end - i, p.out_dtype);
    }
    votes.add_to(p.stats);
  });
}

template <int kDtype, int kExperts>
void masks_all(const TiesMasksParams& p) {
  const Source& s = p.source;
  int64_t first_block[2] = {0, block_count(p.size)}, row_bytes = (p.size + 7) / 8;
  TensorList tensors = {&p.size, first_block, 1};
  for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    Votes votes;
    for (int64_t i = begin; i < end; i += kLanes) {
      int64_t n = end - i < kLanes ? end - i : kLanes;
      F32 base = kExperts ? (n == kLanes ? load_base(s, i) : load_base_first(s, i, n)) : zeros();
      auto trimmed = [&](int64_t k) {
        F32 tau = n == kLanes ? load_tau<kDtype, kExperts>(s, k, i, base)
                              : load_tau_first<kDtype, kExperts>(s, k, i, n, base);
        return trim(tau, broadcast(p.thresholds[k]));
      };
      F32 sum = zeros();
      Mask any = zeros() != zeros();
      for (int64_t k = 0; k < s.k; ++k) {
        F32 x = trimmed(k);
        sum = sum + x;
        any = any | (x != zeros());
      }
      votes.add(sum, any);
      uint32_t up = bits(elects_positive(sum, p.majority));
      // The second read of the deltas comes from the first-level cache.
      for (int64_t k = 0; k < s.k; ++k) {
        F32 x = trimmed(k);
        uint32_t selected = (bits(x > zeros()) & up) | (bits(x < zeros()) & ~up);
        uint8_t* target = p.masks + k * row_bytes + i / 8;
        target[0] = uint8_t(selected);
        if (n > 8) target[1] = uint8_t(selected >> 8);
      }
    }
    votes.add_to(p.stats);
  });
}

}  // namespace

void ties_merge(const TiesMergeParams& p) {
  p.stats[0] = p.stats[1] = 0;
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    switch (p.merge) {
      case Merge::kMean:
        return merge_all<kDtype, kExperts, Merge::kMean>(p);
      case Merge::kSum:
        return merge_all<kDtype, kExperts, Merge::kSum>(p);
      case Merge::kMax:
        return merge_all<kDtype, kExperts, Merge::kMax>(p);
    }
  });
}

void ties_masks(const TiesMasksParams& p) {
  p.stats[0] = p.stats[1] = 0;
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    masks_all<decltype(dtype)::value, decltype(experts)::value>(p);
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
