// y_g = x_g W_g^T + bias with W_g = base + sum_k lambda_gk tau_k, for G groups of rows of x.
//
// A tile of base and task vectors is read once and turned so that a vector holds sixteen outputs'
// entries for one input. In the second-level cache it is combined for one group after the other,
// and each merged tile is multiplied while it is in the first-level cache: no merged weight ever
// reaches memory. Its sums are those of weighted_sum without the terms whose coefficient is zero.
// Products are fused multiply-adds in the order of the inputs, kDepth at a time; these parts are
// added up in fp32. So a row's result depends on nothing but that row and its coefficients.
#include <omp.h>

#include "kernels.h"
#include "parallel.h"
#include "types.h"
#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Outputs of a panel, in vectors of sixteen, and the most rows of x that meet it at once: sums,
// a row of the panel and a number of x fill the registers.
constexpr int kVectors = kParts == 1 ? 2 : 1;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int kMostRows = kParts == 1 ? 14 : kParts == 2 ? 6 : 2;
constexpr int kMostTerms = 8;
constexpr int64_t kLeastGroups = 8;  // for which task vectors are worth reading

// How a group's rows are split to meet the panels: in nearly equal parts.
struct Split {
  int64_t rows, parts;

  explicit Split(int64_t rows) : rows(rows), parts((rows + kMostRows - 1) / kMostRows) {}
  int64_t start(int64_t part) const {
    int64_t larger = rows % parts;
    return part * (rows / parts) + (part < larger ? part : larger);
  }
};

// Part of the inputs: [begin, begin + size).
struct Depth {
  int64_t begin, size;

  Depth(const GroupedLinearParams& p, int64_t number)
      : begin(number * kLinearDepth),
        size(p.inner - begin < kLinearDepth ? p.inner - begin : kLinearDepth) {}
};

inline int64_t row_of(const GroupedLinearParams& p, int64_t i) {
  return p.order == nullptr ? i : p.order[i];
}

// Where x of a group's rows lies, part by part, each [depth, rows].
inline float* packed_rows(const GroupedLinearParams& p, int64_t group, const Depth& depth) {
  return p.packed + depth.begin * p.starts[p.groups] + p.starts[group] * depth.size;
}

inline void pack_rows(const GroupedLinearParams& p, int64_t group, const Depth& depth) {
  Split split(p.starts[group + 1] - p.starts[group]);
  float* packed = packed_rows(p, group, depth);
  for (int64_t part = 0; part < split.parts; ++part) {
    int64_t first = split.start(part), rows = split.start(part + 1) - first;
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = p.x + row_of(p, p.starts[group] + first + r) * p.x_stride + depth.begin;
      for (int64_t i = 0; i < depth.size; ++i) packed[first * depth.size + i * rows + r] = x[i];
    }
  }
}

// Sixteen entries of a weight, of the first n where a row ends sooner.
template <int kDtype>
inline F32 entries(const void* weight, int64_t at, int64_t n) {
  return n >= kLanes ? load<kDtype>(weight, at) : load_first<kDtype>(weight, at, n);
}

// Calls write(i, j, at, n) with the places `at` of n neighbours in the weight that belong from
// input i and output j of a panel on.
template <class Write>
inline void for_each_vector(const GroupedLinearParams& p, const Depth& depth, int64_t column,
                            int64_t columns, Write write) {
  if (p.inner_stride == 1) {
    for (int64_t j = 0; j < columns; ++j) {
      int64_t row = (column + j) * p.outer_stride + depth.begin;
      for (int64_t i = 0; i < depth.size; i += kLanes) write(i, j, row + i, depth.size - i);
    }
    return;
  }
  for (int64_t i = 0; i < depth.size; ++i) {
    int64_t row = (depth.begin + i) * p.inner_stride + column;
    for (int64_t j = 0; j < columns; j += kLanes) write(i, j, row + j, columns - j);
  }
}

// Writes base and the task vectors of a panel, one after the other, to a tile [K + 1, depth,
// kPanel]; outputs past the last are zero.
template <int kDtype, int kExperts>
inline void read_panel(const GroupedLinearParams& p, const Depth& depth, int64_t column,
                       int64_t columns, float* tile) {
  const Source& s = p.source;
  int64_t size = depth.size * kPanel;
  bool turn = p.inner_stride == 1;
  if (columns < kPanel) memset(tile, 0, (s.k + 1) * size * sizeof(float));
  auto put = [&](float* to, int64_t n, F32 value) {
    if (!turn) {
      memcpy(to, &value, sizeof(value));
      return;
    }
    float lanes[kLanes];
    memcpy(lanes, &value, sizeof(lanes));
    for (int64_t lane = 0; lane < kLanes && lane < n; ++lane) to[lane * kPanel] = lanes[lane];
  };
  with_dtype(s.base_dtype, [&](auto dtype) {
    constexpr int kBase = decltype(dtype)::value;
    for_each_vector(p, depth, column, columns, [&](int64_t i, int64_t j, int64_t at, int64_t n) {
      put(tile + i * kPanel + j, n, entries<kBase>(s.base, at, n));
    });
    for (int64_t k = 0; k < s.k; ++k) {
      float* to = tile + (k + 1) * size;
      for_each_vector(p, depth, column, columns, [&](int64_t i, int64_t j, int64_t at, int64_t n) {
        F32 tau = entries<kDtype>(s.deltas[k], at, n);
        if (kExperts) tau = tau - entries<kBase>(s.base, at, n);
        put(to + i * kPanel + j, n, tau);
      });
    }
  });
}

// The terms of one or two groups whose coefficients are not zero.
template <int kGroups>
struct Terms {
  const float* taus[kMostTerms];
  float lambdas[kGroups][kMostTerms];
  const float* from[kGroups];
  float* to[kGroups];
};

template <int kGroups, int kCount>
inline void add_terms(const Terms<kGroups>& terms, int64_t n) {
  F32 lambda[kGroups][kCount == 0 ? 1 : kCount];
  for (int g = 0; g < kGroups; ++g) {
    for (int k = 0; k < kCount; ++k) lambda[g][k] = broadcast(terms.lambdas[g][k]);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    F32 sums[kGroups];
    for (int g = 0; g < kGroups; ++g) sums[g] = load<kFloat32>(terms.from[g], i);
    _Pragma("GCC unroll 8") for (int k = 0; k < kCount; ++k) {
      F32 tau = load<kFloat32>(terms.taus[k], i);
      for (int g = 0; g < kGroups; ++g) sums[g] = sums[g] + lambda[g][k] * tau;
    }
    for (int g = 0; g < kGroups; ++g) memcpy(terms.to[g] + i, &sums[g], sizeof(F32));
  }
}

template <int kGroups, int kCount = kMostTerms>
inline void add_some_terms(int count, const Terms<kGroups>& terms, int64_t n) {
  if (count == kCount) return add_terms<kGroups, kCount>(terms, n);
  if constexpr (kCount > 0) add_some_terms<kGroups, kCount - 1>(count, terms, n);
}

// Merges a tile [K + 1, n] for groups whose coefficients are zero for the same task vectors.
template <int kGroups>
inline void merge_tile(const float* tile, int64_t n, int64_t count, const float* coefficients,
                       float* const* merged) {
  Terms<kGroups> terms;
  for (int g = 0; g < kGroups; ++g) terms.from[g] = tile;
  for (int g = 0; g < kGroups; ++g) terms.to[g] = merged[g];
  int64_t k = 0;
  do {
    int found = 0;
    for (; k < count && found < kMostTerms; ++k) {
      if (coefficients[k] == 0.0f) continue;
      terms.taus[found] = tile + (k + 1) * n;
      for (int g = 0; g < kGroups; ++g) terms.lambdas[g][found] = coefficients[g * count + k];
      ++found;
    }
    add_some_terms<kGroups>(found, terms, n);
    for (int g = 0; g < kGroups; ++g) terms.from[g] = merged[g];
  } while (k < count);
}

inline bool zero_alike(const float* a, const float* b, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if ((a[k] == 0.0f) != (b[k] == 0.0f)) return false;
  }
  return true;
}

// Where a product goes: entries `columns` of rows of y from `column` on.
struct Target {
  const GroupedLinearParams& p;
  int64_t first, column, columns;
  bool begins;  // whether bias takes the place of what y holds
};

// Adds x [depth, kRows] times a merged panel [depth, kPanel] to y.
template <int kRows>
inline void multiply(const Target& t, const float* x, const float* panel, int64_t depth) {
  F32 sums[kRows][kVectors];
  _Pragma("GCC unroll 14") for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zeros();
  }
  for (int64_t i = 0; i < depth; ++i) {
    F32 w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load<kFloat32>(panel, i * kPanel + v * kLanes);
    _Pragma("GCC unroll 14") for (int r = 0; r < kRows; ++r) {
      F32 factor = broadcast(x[i * kRows + r]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(factor, w[v], sums[r][v]);
    }
  }
  _Pragma("GCC unroll 14") for (int r = 0; r < kRows; ++r) {
    float* y = t.p.y + row_of(t.p, t.first + r) * t.p.outer + t.column;
    const float* before = !t.begins ? y : t.p.bias == nullptr ? nullptr : t.p.bias + t.column;
    for (int v = 0; v < kVectors; ++v) {
      int64_t at = v * kLanes, n = t.columns - at;
      if (n >= kLanes) {
        F32 old = before == nullptr ? zeros() : load<kFloat32>(before, at);
        store<kFloat32>(y, at, old + sums[r][v]);
      } else if (n > 0) {
        F32 old = before == nullptr ? zeros() : load_first<kFloat32>(before, at, n);
        store_first<kFloat32>(y, at, old + sums[r][v], n);
      }
    }
  }
}

template <int kRows = kMostRows>
inline void multiply_some(int64_t rows, const Target& t, const float* x, const float* panel,
                          int64_t depth) {
  if (rows == kRows) return multiply<kRows>(t, x, panel, depth);
  if constexpr (kRows > 1) multiply_some<kRows - 1>(rows, t, x, panel, depth);
}

// All groups of [group, end) with outputs [column, column + columns).
template <int kDtype, int kExperts>
inline void outputs_of(const GroupedLinearParams& p, int64_t group, int64_t end, int64_t column,
                       int64_t columns, float* scratch) {
  int64_t count = p.source.k, depths = linear_depths(p.inner);
  int64_t panels = (columns + kPanel - 1) / kPanel;
  for (int64_t d = 0; d < depths; ++d) {
    Depth depth(p, d);
    int64_t size = depth.size * kPanel, tile = (count + 1) * size;
    float* merged[2] = {scratch + panels * tile, scratch + panels * (tile + size)};
    for (int64_t j = 0; j < panels; ++j) {
      int64_t left = columns - j * kPanel;
      read_panel<kDtype, kExperts>(p, depth, column + j * kPanel, left < kPanel ? left : kPanel,
                                   scratch + j * tile);
    }
    for (int64_t g = group; g < end;) {
      const float* lambda = p.coefficients + g * count;
      int together = g + 1 < end && zero_alike(lambda, lambda + count, count) ? 2 : 1;
      for (int64_t j = 0; j < panels; ++j) {
        float* targets[2] = {merged[0] + j * size, merged[1] + j * size};
        const float* source = scratch + j * tile;
        if (together == 2) {
          merge_tile<2>(source, size, count, lambda, targets);
        } else {
          merge_tile<1>(source, size, count, lambda, targets);
        }
      }
      for (int i = 0; i < together; ++i, ++g) {
        Split split(p.starts[g + 1] - p.starts[g]);
        const float* x = packed_rows(p, g, depth);
        for (int64_t j = 0; j < panels; ++j) {
          for (int64_t part = 0; part < split.parts; ++part) {
            int64_t first = split.start(part), rows = split.start(part + 1) - first;
            Target t{p, p.starts[g] + first, column + j * kPanel, columns - j * kPanel, d == 0};
            multiply_some(rows, t, x + first * depth.size, merged[i] + j * size, depth.size);
          }
        }
      }
    }
  }
}

}  // namespace

void grouped_linear(const GroupedLinearParams& p) {
  int64_t rows = p.starts[p.groups], depths = linear_depths(p.inner);
  int team = team_size(rows * p.outer, p.threads);
  parallel_runs(p.groups * depths, team, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) pack_rows(p, i % p.groups, Depth(p, i / p.groups));
  });
  int64_t width = linear_width(p.source.k), blocks = (p.outer + width - 1) / width;
  // Threads that have no outputs of their own share them, by groups; each reads its task vectors.
  int64_t wanted = blocks > 0 ? (2 * team + blocks - 1) / blocks : 1;
  int64_t most = (p.groups + kLeastGroups - 1) / kLeastGroups;
  int64_t shares = wanted < most ? wanted : most;
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
    constexpr int kDtype = decltype(dtype)::value, kExperts = decltype(experts)::value;
    parallel_runs(blocks * shares, team, [&](int64_t first, int64_t last) {
      int64_t thread = team > 1 ? omp_get_thread_num() : 0;
      float* scratch = p.scratch + thread * grouped_linear_scratch(p.source.k);
      for (int64_t i = first; i < last; ++i) {
        int64_t column = i / shares * width, share = i % shares;
        int64_t left = p.outer - column;
        outputs_of<kDtype, kExperts>(p, p.groups * share / shares, p.groups * (share + 1) / shares,
                                     column, left < width ? left : width, scratch);
      }
    });
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
