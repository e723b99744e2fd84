// EMR's election: the unified task vector, packed masks and the norms of the rescalers.
//
// Contiguous tensors; all results are overwritten. A tile of all deltas is read twice, the second
// time from the first-level cache: once for the sign and the extremes, once for masks and sums.
// Sums of a tile are taken in sixteen fp32 lanes and folded into fp64.
#include "combine.h"
#include "kernels.h"
#include "masks.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

template <int kDtype, int kExperts>
FASTMERGE_INLINE F32 read_tau(const Source& s, int64_t k, int64_t i, int64_t n, F32 base) {
  if (n == kLanes) return load_tau<kDtype, kExperts>(s, k, i, base);
  return load_tau_first<kDtype, kExperts>(s, k, i, n, base);
}

// The unified values of one vector before they are rounded.
template <int kDtype, int kExperts>
FASTMERGE_INLINE F32 elected(const ElectParams& p, int64_t i, int64_t n, F32 base) {
  const Source& s = p.source;
  F32 total = zeros(), largest = zeros(), smallest = zeros();
  for (int64_t k = 0; k < s.k; ++k) {
    F32 tau = read_tau<kDtype, kExperts>(s, k, i, n, base);
    total = total + select(tau == tau, tau, zeros());
    largest = select(tau > largest, tau, largest);
    smallest = select(tau < smallest, tau, smallest);
  }
  F32 unified = select(total > zeros(), largest, smallest);
  return p.leave_out ? select(total == zeros(), zeros(), unified) : unified;
}

// One tile: unified values first, then for each task its bits and sums.
template <int kDtype, int kExperts>
inline void elect_tile(const ElectParams& p, int64_t begin, int64_t end, int64_t byte,
                       double* sums) {
  const Source& s = p.source;
  float bases[kTile], signs[kTile],
      sizes[kTile];  // of the tile: base, unified, |unified| as stored
  for (int64_t i = begin; i < end; i += kLanes) {
    int64_t n = end - i < kLanes ? end - i : kLanes, at = i - begin;
    F32 base = zeros();
    if (kExperts) base = n == kLanes ? load_base(s, i) : load_base_first(s, i, n);
    F32 unified = elected<kDtype, kExperts>(p, i, n, base), stored;
    if (n == kLanes) {
      store(p.unified, i, unified, p.unified_dtype);
      stored = load(p.unified, i, p.unified_dtype);
    } else {
      store_first(p.unified, i, unified, n, p.unified_dtype);
      stored = load_first(p.unified, i, n, p.unified_dtype);
    }
    stored = absolute(stored);
    memcpy(bases + at, &base, sizeof(base));
    memcpy(signs + at, &unified, sizeof(unified));
    memcpy(sizes + at, &stored, sizeof(stored));
  }
  int64_t row_bytes = mask_bytes(joined_rows(p.shape).columns) * joined_rows(p.shape).rows;
  for (int64_t k = 0; k < s.k; ++k) {
    uint8_t* mask = p.masks + k * row_bytes + byte;
    F32 all = zeros(), kept = zeros();
    auto vector = [&](int64_t at, int64_t n) {
      F32 base, sign, size;
      memcpy(&base, bases + at, sizeof(base));
      memcpy(&sign, signs + at, sizeof(sign));
      memcpy(&size, sizes + at, sizeof(size));
      F32 tau = read_tau<kDtype, kExperts>(s, k, begin + at, n, base);
      Mask agree = ((sign > zeros()) & (tau > zeros())) | ((sign < zeros()) & (tau < zeros()));
      all = all + absolute(tau);
      kept = kept + select(agree, size, zeros());
      return bits(agree);
    };
    int64_t at = 0, count = end - begin;
    for (; at + kLanes <= count; at += kLanes) {
      uint16_t word = uint16_t(vector(at, kLanes));
      memcpy(mask + at / 8, &word, sizeof(word));
    }
    if (at < count) store_mask(mask, count, at, vector(at, count - at));
    sums[k] += fold(all);
    sums[s.k + k] += fold(kept);
  }
}

}  // namespace

void elect(const ElectParams& p) {
  int64_t sums = 2 * p.source.k;
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    for_each_mask_block(p.shape, p.threads, [&](MaskSpan span) {
      double* partial = p.scratch + span.block * sums;
      for (int64_t c = 0; c < sums; ++c) partial[c] = 0;
      for (int64_t begin = span.begin; begin < span.end; begin += kTile) {
        int64_t end = begin + kTile < span.end ? begin + kTile : span.end;
        int64_t byte = span.byte + (begin - span.begin) / 8;
        elect_tile<decltype(dtype)::value, decltype(experts)::value>(p, begin, end, byte, partial);
      }
    });
  });
  sum_partials(p.scratch, mask_blocks(p.shape), sums, p.magnitudes);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
