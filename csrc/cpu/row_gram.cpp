// Inner products of all pairs of task vectors along every row, and exact sums of such numbers.
//
// Contiguous tensors; gram is overwritten, limbs is added to. Products are exact in fp64 and are
// added in sixteen lanes from the start of each row, folded in one order. exact_sums adds numbers
// as integers, so that any order gives the same bits.
#include "combine.h"
#include "kernels.h"
#include "parallel.h"
#include "wide.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Deltas whose products are formed together, and entries read at a time.
constexpr int64_t kSquare = 8;
constexpr int64_t kVectors = 8;

struct Tile {
  F64 tau[kSquare][kVectors];
};

template <int kDtype, int kExperts>
FASTMERGE_INLINE void read_tile(const Source& s, int64_t first, int64_t last, int64_t begin,
                                int64_t end, Tile& tile) {
  int64_t v = 0;
  for (int64_t i = begin; i < end; i += kLanes, ++v) {
    int64_t n = end - i < kLanes ? end - i : kLanes;
    F32 base = zeros();
    if (kExperts) base = n == kLanes ? load_base(s, i) : load_base_first(s, i, n);
    for (int64_t k = first; k < last; ++k) {
      F32 tau = n == kLanes ? load_tau<kDtype, kExperts>(s, k, i, base)
                            : load_tau_first<kDtype, kExperts>(s, k, i, n, base);
      tile.tau[k - first][v] = widen(tau);
    }
  }
}

// Pairs (a, b) of one row with a in [first, first + kSquare), b in [other, other + kSquare).
template <int kDtype, int kExperts>
void multiply_row(const RowGramParams& p, int64_t row, int64_t first, int64_t other) {
  const Source& s = p.source;
  int64_t last = first + kSquare < s.k ? first + kSquare : s.k;
  int64_t other_last = other + kSquare < s.k ? other + kSquare : s.k;
  Tile left, right;
  F64 sums[kSquare][kSquare] = {};
  int64_t stop = (row + 1) * p.width;
  for (int64_t begin = row * p.width; begin < stop; begin += kVectors * kLanes) {
    int64_t end = begin + kVectors * kLanes < stop ? begin + kVectors * kLanes : stop;
    int64_t vectors = (end - begin + kLanes - 1) / kLanes;
    read_tile<kDtype, kExperts>(s, first, last, begin, end, left);
    if (other != first) read_tile<kDtype, kExperts>(s, other, other_last, begin, end, right);
    const Tile& b_tile = other == first ? left : right;
    for (int64_t a = first; a < last; ++a) {
      for (int64_t b = other > a ? other : a; b < other_last; ++b) {
        F64 sum = sums[a - first][b - other];
        for (int64_t v = 0; v < vectors; ++v) {
          sum = add_product(sum, left.tau[a - first][v], b_tile.tau[b - other][v]);
        }
        sums[a - first][b - other] = sum;
      }
    }
  }
  double* out = p.gram + row * (s.k * (s.k + 1) / 2);
  for (int64_t a = first; a < last; ++a) {
    for (int64_t b = other > a ? other : a; b < other_last; ++b) {
      out[a * s.k - a * (a - 1) / 2 + (b - a)] = fold(sums[a - first][b - other]);
    }
  }
}

// The same for all pairs of a few task vectors, whose sums stay in registers.
template <int kDtype, int kExperts, int kCount>
void multiply_few(const RowGramParams& p, int64_t row) {
  const Source& s = p.source;
  constexpr int kPairs = kCount * (kCount + 1) / 2;
  F64 sums[kPairs] = {};
  int64_t i = row * p.width, stop = i + p.width;
  auto add = [&](F32 base, auto load) {
    F64 tau[kCount];
    _Pragma("GCC unroll 4") for (int k = 0; k < kCount; ++k) tau[k] = widen(load(k, base));
    int pair = 0;
    _Pragma("GCC unroll 4") for (int a = 0; a < kCount; ++a) {
      _Pragma("GCC unroll 4") for (int b = a; b < kCount; ++b, ++pair) {
        sums[pair] = add_product(sums[pair], tau[a], tau[b]);
      }
    }
  };
  for (; i + kLanes <= stop; i += kLanes) {
    add(kExperts ? load_base(s, i) : zeros(),
        [&](int k, F32 base) { return load_tau<kDtype, kExperts>(s, k, i, base); });
  }
  if (i < stop) {
    add(kExperts ? load_base_first(s, i, stop - i) : zeros(),
        [&](int k, F32 base) { return load_tau_first<kDtype, kExperts>(s, k, i, stop - i, base); });
  }
  for (int pair = 0; pair < kPairs; ++pair) p.gram[row * kPairs + pair] = fold(sums[pair]);
}

template <int kDtype, int kExperts>
void multiply_all(const RowGramParams& p, int64_t row) {
  int64_t count = p.source.k;
  if (count == 2) return multiply_few<kDtype, kExperts, 2>(p, row);
  if (count == 3) return multiply_few<kDtype, kExperts, 3>(p, row);
  if (count == 4) return multiply_few<kDtype, kExperts, 4>(p, row);
  for (int64_t first = 0; first < count; first += kSquare) {
    for (int64_t other = first; other < count; other += kSquare) {
      multiply_row<kDtype, kExperts>(p, row, first, other);
    }
  }
}

}  // namespace

void row_gram(const RowGramParams& p) {
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    int64_t rows = p.width > 0 ? p.size / p.width : 0;
    parallel_runs(rows, team_size(p.size, p.threads), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        multiply_all<decltype(dtype)::value, decltype(experts)::value>(p, row);
      }
    });
  });
}

void exact_sums(const ExactSumsParams& p) {
  for (int64_t i = 0; i < p.rows * p.columns; ++i) {
    int64_t* limbs = p.limbs + (i % p.columns) * kLimbs;
    uint64_t u;
    memcpy(&u, p.values + i, sizeof(u));
    uint64_t exponent = (u >> 52) & 0x7ff, mantissa = u & ((uint64_t(1) << 52) - 1);
    if (exponent == 0x7ff) {
      ++limbs[kLimbs - 1];
      continue;
    }
    if (exponent > 0) {
      mantissa |= uint64_t(1) << 52;
      --exponent;
    }
    int shift = int(exponent % 32);
    uint64_t low = mantissa << shift, high = shift > 0 ? mantissa >> (64 - shift) : 0;
    int64_t sign = u >> 63 ? -1 : 1;
    int64_t* target = limbs + exponent / 32;
    target[0] += sign * int64_t(low & 0xffffffffu);
    target[1] += sign * int64_t(low >> 32);
    target[2] += sign * int64_t(high);
  }
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
