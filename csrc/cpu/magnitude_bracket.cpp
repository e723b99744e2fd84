// Counts of |tau| below, in the bins of, and above a bracket of magnitudes.
//
// Contiguous tensors; counts is added to. Integers only after the subtraction, so every order of
// counting gives the same result. Every NaN is counted as the quiet NaN, above infinity. Made for
// brackets that few entries fall into: those are counted one by one, the others by vectors.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Writes the chosen lanes one after the other; may write kLanes of them. Returns how many.
FASTMERGE_INLINE int compress(uint32_t* out, F32 x, Mask chosen) {
  uint32_t lanes = bits(chosen);
#if defined(__AVX512F__)
  // by way of a register, without a branch that would be mispredicted at most hits
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(lanes), (__m512i)x.part[0]));
  return __builtin_popcount(lanes);
#else
  if (lanes == 0) return 0;
  uint32_t u[kLanes];
  memcpy(u, &x, sizeof(u));
  int count = 0;
  for (; lanes != 0; lanes &= lanes - 1) out[count++] = u[__builtin_ctz(lanes)];
  return count;
#endif
}

// Counts of one block: entries below by lanes, those inside by way of a list.
struct Tally {
  const MagnitudeBracketParams& p;
  bool shared;  // whether other threads count as well
  int32_t low = int32_t(p.low);
  int32_t last = int32_t(last_of(p));
  int64_t below = 0, inside = 0;

  static int64_t last_of(const MagnitudeBracketParams& p) {
    int64_t last = p.low + (p.bins << p.shift) - 1;
    return last < INT32_MAX ? last : INT32_MAX;
  }

  template <class LoadTau>
  FASTMERGE_INLINE void count_vectors(int64_t begin, int64_t end, LoadTau load_tau) {
    uint32_t hits[kTile + kLanes];
    int64_t found = 0;
    Mask under = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      F32 magnitude = absolute(canonical_nan(load_tau(i)));
      Mask in;
      FASTMERGE_PARTS {
        PartI u = (PartI)magnitude.part[j];
        under.part[j] += u < low;
        in.part[j] = (u >= low) & (u <= last);
      }
      found += compress(hits + found, magnitude, in);
    }
    int32_t lanes[kLanes];
    memcpy(lanes, &under, sizeof(lanes));
    for (int j = 0; j < kLanes; ++j) below -= lanes[j];
    for (int64_t h = 0; h < found; ++h) count_inside(hits[h]);
  }

  void count_first(F32 tau, int64_t n) {
    F32 magnitude = absolute(canonical_nan(tau));
    int32_t u[kLanes];
    memcpy(u, &magnitude, sizeof(u));
    for (int64_t j = 0; j < n; ++j) {
      below += u[j] < low;
      if (u[j] >= low && u[j] <= last) count_inside(uint32_t(u[j]));
    }
  }

  FASTMERGE_INLINE void count_inside(uint32_t u) {
    int64_t* bin = p.counts + 1 + ((u - uint32_t(low)) >> p.shift);
    ++inside;
    if (shared) {
      __atomic_fetch_add(bin, 1, __ATOMIC_RELAXED);
    } else {
      ++*bin;
    }
  }

  void flush(int64_t entries) const {
    __atomic_fetch_add(p.counts, below, __ATOMIC_RELAXED);
    __atomic_fetch_add(p.counts + 1 + p.bins, entries - below - inside, __ATOMIC_RELAXED);
  }
};

template <int kDtype, int kExperts>
void count_all(const MagnitudeBracketParams& p) {
  Source source = {p.base, &p.delta, 1, p.base_dtype, p.delta_dtype, p.experts};
  int64_t first_block[2] = {0, block_count(p.size)};
  TensorList tensors = {&p.size, first_block, 1};
  bool shared = team_size(p.size, p.threads) > 1;
  for_each_block(tensors, p.threads, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    Tally tally = {p, shared};
    int64_t whole = begin + (end - begin) / kLanes * kLanes;
    for (int64_t tile = begin; tile < whole; tile += kTile) {
      tally.count_vectors(tile, tile + kTile < whole ? tile + kTile : whole, [&](int64_t i) {
        F32 base = kExperts ? load_base(source, i) : zeros();
        return load_tau<kDtype, kExperts>(source, 0, i, base);
      });
    }
    if (whole < end) {
      F32 base = kExperts ? load_base_first(source, whole, end - whole) : zeros();
      F32 tau = load_tau_first<kDtype, kExperts>(source, 0, whole, end - whole, base);
      tally.count_first(tau, end - whole);
    }
    tally.flush(end - begin);
  });
}

}  // namespace

void magnitude_bracket(const MagnitudeBracketParams& p) {
  with_source(p.delta_dtype, p.experts, [&](auto dtype, auto experts) {
    count_all<decltype(dtype)::value, decltype(experts)::value>(p);
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
