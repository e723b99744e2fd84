// Counts of the high or the low bits of |tau|, from which the exact k-th magnitude is read.
//
// Contiguous tensors; counts is added to. Integers only after the subtraction, so every order of
// counting gives the same result. Every NaN is counted as the quiet NaN, above infinity.
#include <omp.h>

#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

constexpr int kLowBits = 15;
// A thread's table has to be cleared and added up, which costs as much as counting this many.
constexpr int64_t kTableCost = 8;
// Elements read ahead.
constexpr int64_t kPrefetch = 1024;

template <int kLevel>
FASTMERGE_INLINE void count_vector(F32 magnitude, uint32_t lanes, uint32_t prefix,
                                   int64_t* counts) {
  uint32_t u[kLanes];
  memcpy(u, &magnitude, sizeof(u));
  if constexpr (kLevel == 0) {
    for (uint32_t j = 0; j < lanes; ++j) ++counts[u[j] >> kLowBits];
  } else {
    Mask same;
    FASTMERGE_PARTS same.part[j] = (PartI)(((PartU)magnitude.part[j] >> kLowBits) == prefix);
    uint32_t hits = bits(same) & ((1u << lanes) - 1);
    for (; hits != 0; hits &= hits - 1) ++counts[u[__builtin_ctz(hits)] & ((1u << kLowBits) - 1)];
  }
}

template <int kDtype, int kExperts, int kLevel>
void count_range(const Source& s, uint32_t prefix, int64_t* counts, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    F32 base = kExperts ? load_base(s, i) : zeros();
    // The counters' scattered writes keep the hardware prefetchers from running ahead.
    prefetch(s.deltas[0], i + kPrefetch, kDtype);
    if (kExperts) prefetch(s.base, i + kPrefetch, s.base_dtype);
    F32 tau = load_tau<kDtype, kExperts>(s, 0, i, base);
    count_vector<kLevel>(absolute(canonical_nan(tau)), kLanes, prefix, counts);
  }
  if (i < end) {
    F32 base = kExperts ? load_base_first(s, i, end - i) : zeros();
    F32 tau = load_tau_first<kDtype, kExperts>(s, 0, i, end - i, base);
    count_vector<kLevel>(absolute(canonical_nan(tau)), uint32_t(end - i), prefix, counts);
  }
}

template <int kDtype, int kExperts, int kLevel>
void count_all(const MagnitudeHistogramParams& p) {
  Source source = {p.base, &p.delta, 1, p.base_dtype, p.delta_dtype, p.experts};
  int team = team_size(p.size / kTableCost, p.threads);
  if (team > 1) memset(p.scratch, 0, team * kHistogramBins * sizeof(int64_t));
  parallel_runs(block_count(p.size), team, [&](int64_t first, int64_t last) {
    int64_t* counts =
        team > 1 ? p.scratch + int64_t(omp_get_thread_num()) * kHistogramBins : p.counts;
    int64_t end = last * kBlock < p.size ? last * kBlock : p.size;
    count_range<kDtype, kExperts, kLevel>(source, uint32_t(p.prefix), counts, first * kBlock, end);
  });
  if (team == 1) return;
  for (int t = 0; t < team; ++t) {
    for (int64_t bin = 0; bin < kHistogramBins; ++bin) {
      p.counts[bin] += p.scratch[t * kHistogramBins + bin];
    }
  }
}

}  // namespace

void magnitude_histogram(const MagnitudeHistogramParams& p) {
  with_source(p.delta_dtype, p.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    if (p.level == 0) {
      count_all<kDtype, kExperts, 0>(p);
    } else {
      count_all<kDtype, kExperts, 1>(p);
    }
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
