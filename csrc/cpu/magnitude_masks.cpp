// Masks of the entries between two cuts of the order of magnitudes, and where entries equal a cut.
//
// Contiguous tensors; masks is overwritten, counts is added to. An entry is above a cut (value,
// index) when its |tau| is larger than the value, or equal to it while the entry's index in the
// whole tensor is below the cut's; kept are entries above the lower and not above the upper cut. A
// NaN is above no cut.
#include "combine.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Bits of the lanes above a cut; `ties` entries from here on have indices below the cut's.
FASTMERGE_INLINE uint32_t above(F32 magnitude, float value, int64_t ties) {
  uint32_t larger = bits(magnitude > broadcast(value));
  if (ties <= 0) return larger;
  uint32_t equal = bits(magnitude == broadcast(value));
  if (ties < kLanes) equal &= (1u << ties) - 1;
  return larger | equal;
}

template <int kDtype, int kExperts>
void masks_of_range(const MagnitudeMasksParams& p, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < p.source.k; ++k) {
    uint8_t* row = p.masks + k * mask_bytes(p.size);
    float upper = p.values[2 * k], lower = p.values[2 * k + 1];
    int64_t upper_index = p.indices[2 * k] - p.offset,
            lower_index = p.indices[2 * k + 1] - p.offset;
    for (int64_t i = begin; i < end; i += 64) {
      uint64_t word = 0;
      for (int64_t v = i; v < i + 64 && v < end; v += kLanes) {
        int64_t n = end - v < kLanes ? end - v : kLanes;
        F32 tau;
        if (n == kLanes) {
          F32 base = kExperts ? load_base(p.source, v) : zeros();
          tau = load_tau<kDtype, kExperts>(p.source, k, v, base);
        } else {
          F32 base = kExperts ? load_base_first(p.source, v, n) : zeros();
          tau = load_tau_first<kDtype, kExperts>(p.source, k, v, n, base);
        }
        F32 magnitude = absolute(tau);
        uint32_t kept =
            above(magnitude, lower, lower_index - v) & ~above(magnitude, upper, upper_index - v);
        word |= uint64_t(kept & 0xffffu) << (v - i);
      }
      store_mask(row, end, i, word);
    }
  }
}

// How many entries of [begin, end) have the magnitude `value`.
template <int kDtype, int kExperts>
int64_t count_equal(const Source& s, int64_t k, float value, int64_t begin, int64_t end) {
  int64_t i = begin, count = 0;
  Mask found = {};
  for (; i + kLanes <= end; i += kLanes) {
    F32 base = kExperts ? load_base(s, i) : zeros();
    Mask equal = absolute(load_tau<kDtype, kExperts>(s, k, i, base)) == broadcast(value);
    FASTMERGE_PARTS found.part[j] -= equal.part[j];
  }
  int32_t lanes[kLanes];
  memcpy(lanes, &found, sizeof(lanes));
  for (int j = 0; j < kLanes; ++j) count += uint32_t(lanes[j]);
  if (i < end) {
    int64_t n = end - i;
    F32 base = kExperts ? load_base_first(s, i, n) : zeros();
    F32 tau = load_tau_first<kDtype, kExperts>(s, k, i, n, base);
    uint32_t equal = bits(absolute(tau) == broadcast(value)) & ((1u << n) - 1);
    count += __builtin_popcount(equal);
  }
  return count;
}

template <int kDtype, int kExperts>
void count_ties(const TieCountsParams& p, int64_t k) {
  int64_t start = p.starts[k] - p.offset;
  int64_t first = start < 0 ? -start / p.width : 0;
  for (int64_t bin = first; bin < p.bins; ++bin) {
    int64_t begin = start + bin * p.width, end = begin + p.width;
    if (begin >= p.size) break;
    if (begin < 0) begin = 0;
    if (end > p.size) end = p.size;
    p.counts[k * p.bins + bin] +=
        count_equal<kDtype, kExperts>(p.source, k, p.values[k], begin, end);
  }
}

}  // namespace

void tie_counts(const TieCountsParams& p) {
  int team = team_size(p.size * p.source.k, p.threads);
  if (team > p.source.k) team = int(p.source.k);
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
    for (int64_t k = 0; k < p.source.k; ++k) {
      count_ties<decltype(dtype)::value, decltype(experts)::value>(p, k);
    }
  });
}

void magnitude_masks(const MagnitudeMasksParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    int64_t first_block[2] = {0, block_count(p.size)};
    TensorList tensors = {&p.size, first_block, 1};
    for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
      masks_of_range<decltype(dtype)::value, decltype(experts)::value>(p, begin, end);
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
