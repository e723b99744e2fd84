// Random masks: every entry is kept with a probability that may grow with its rank in its row.
//
// Contiguous tensors; masks is overwritten. A draw u of 32 bits keeps its entry where u < T, T =
// 2^32 p. With equal probabilities deltas are not read. Otherwise rank 0 is the smallest |tau| of
// the row, equal magnitudes in the order of their indices, and T grows with the rank. Most draws
// decide whatever the rank is; for the others a histogram of the row bounds the rank, and only the
// few that fall inside its bin's bounds need the rank itself.
#include "combine.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "philox.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Ranks looked up by reading the row before sorting it is cheaper.
constexpr int kScans = 16;

void equal_probability(const RandomMasksParams& p, int64_t k) {
  uint64_t threshold = uint64_t(p.thresholds[2 * k] * 0x1p32);
  int64_t words = (p.size + 63) / 64;
  int shift = int(p.offset % kGroupEntries);
  uint64_t group = uint64_t(p.offset) / kGroupEntries;
  uint8_t* row = p.masks + k * mask_bytes(p.size);
  parallel_runs(words, team_size(p.size, p.threads), [&](int64_t begin, int64_t end) {
    uint64_t next = draws_below(p.key, uint32_t(k), group + uint64_t(begin), threshold);
    for (int64_t w = begin; w < end; ++w) {
      uint64_t word = next;
      if (shift != 0 || w + 1 < end) {
        next = draws_below(p.key, uint32_t(k), group + uint64_t(w) + 1, threshold);
      }
      if (shift != 0) word = (word >> shift) | (next << (64 - shift));
      store_mask(row, p.size, w * 64, word);
    }
  });
}

// One row of magnitudes, and the room to sort it.
struct Row {
  float* magnitude;  // [width]
  uint32_t* bin;     // [width]
  uint32_t* first;   // [width + 1], ranks below each bin
  uint32_t* rank;    // [width], valid when sorted
  uint32_t* order;   // [width]
  uint32_t* spare;   // [width]
  int64_t width;
  int scans;
  bool sorted;

  void count() {
    float most = 0.0f;
    for (int64_t i = 0; i < width; ++i) most = magnitude[i] > most ? magnitude[i] : most;
    float scale = float(width) / most;
    if (!(scale < 1e30f)) scale = 0.0f;
    memset(first, 0, (width + 1) * sizeof(uint32_t));
    float last = float(width - 1);
    for (int64_t i = 0; i < width; ++i) {
      float x = magnitude[i] * scale;  // grows with the magnitude, so bins are in order
      bin[i] = uint32_t(x < last ? x : last);
    }
    for (int64_t i = 0; i < width; ++i) ++first[bin[i] + 1];
    for (int64_t b = 0; b < width; ++b) first[b + 1] += first[b];
    scans = 0;
    sorted = false;
  }

  uint32_t rank_of(int64_t i) {
    if (!sorted && ++scans > kScans) sort();
    if (sorted) return rank[i];
    uint32_t before = 0;
    float own = magnitude[i];
    for (int64_t j = 0; j < i; ++j) before += magnitude[j] <= own;
    for (int64_t j = i + 1; j < width; ++j) before += magnitude[j] < own;
    return before;
  }

  // Radix sort of the magnitudes' bits, eight at a time; stable.
  void sort() {
    for (int64_t i = 0; i < width; ++i) order[i] = uint32_t(i);
    for (int shift = 0; shift < 32; shift += 8) {
      uint32_t start[257] = {};
      auto digit = [&](uint32_t i) {
        uint32_t u;
        memcpy(&u, magnitude + i, sizeof(u));
        return (u >> shift) & 255u;
      };
      for (int64_t i = 0; i < width; ++i) ++start[digit(uint32_t(i)) + 1];
      for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
      for (int64_t i = 0; i < width; ++i) spare[start[digit(order[i])]++] = order[i];
      uint32_t* swap = order;
      order = spare;
      spare = swap;
    }
    for (int64_t r = 0; r < width; ++r) rank[order[r]] = uint32_t(r);
    sorted = true;
  }
};

struct RankThresholds {
  double low, high;
  int64_t width;

  FASTMERGE_INLINE uint64_t at(uint32_t rank) const {
    double p = width > 1 ? low + (high - low) * (double(rank) / double(width - 1))
                         : low + (high - low) * 0.5;
    return uint64_t(p * 0x1p32);
  }
};

template <int kDtype, int kExperts>
void by_rank(const RandomMasksParams& p, int64_t k, char* scratch) {
  int64_t width = p.width;
  uint32_t* room = reinterpret_cast<uint32_t*>(scratch);
  Row row = {reinterpret_cast<float*>(room),
             room + width,
             room + 2 * width,
             room + 3 * width + 1,
             room + 4 * width + 1,
             room + 5 * width + 1,
             width,
             0,
             false};
  RankThresholds thresholds = {p.thresholds[2 * k], p.thresholds[2 * k + 1], width};
  uint64_t least = thresholds.at(0), most = thresholds.at(uint32_t(width - 1));
  uint8_t* out = p.masks + k * mask_bytes(p.size);
  uint64_t word = 0, group = ~uint64_t(0), low_group = ~uint64_t(0);
  uint16_t high[kGroupEntries], low[kGroupEntries];
  auto draw = [&](uint16_t* halves, bool below) {
    RandomHalves draws = random_halves(p.key, uint32_t(k), below, group);
    for (int e = 0; e < kGroupEntries; ++e) halves[e] = uint16_t(draws.half[e / 8][e % 8]);
  };
  for (int64_t begin = 0; begin < p.size; begin += width) {
    for (int64_t i = 0; i < width; i += kLanes) {
      int64_t n = width - i < kLanes ? width - i : kLanes;
      if (n == kLanes) {
        F32 base = kExperts ? load_base(p.source, begin + i) : zeros();
        F32 tau = load_tau<kDtype, kExperts>(p.source, k, begin + i, base);
        store<kFloat32>(row.magnitude, i, absolute(canonical_nan(tau)));
      } else {
        F32 base = kExperts ? load_base_first(p.source, begin + i, n) : zeros();
        F32 tau = load_tau_first<kDtype, kExperts>(p.source, k, begin + i, n, base);
        store_first<kFloat32>(row.magnitude, i, absolute(canonical_nan(tau)), n);
      }
    }
    row.count();
    for (int64_t i = 0; i < width; ++i) {
      uint64_t index = uint64_t(p.offset + begin + i);
      if (index / kGroupEntries != group) {
        group = index / kGroupEntries;
        draw(high, false);
      }
      int e = int(index % kGroupEntries);
      uint64_t from = uint64_t(high[e]) << 16, to = from | 0xffffu;
      bool keep = to < least;
      if (!keep && from < most) {
        uint32_t bin = row.bin[i];
        keep = to < thresholds.at(row.first[bin]);
        if (!keep && from < thresholds.at(row.first[bin + 1] - 1)) {
          if (low_group != group) {
            low_group = group;
            draw(low, true);
          }
          keep = (from | low[e]) < thresholds.at(row.rank_of(i));
        }
      }
      int64_t at = begin + i;
      word |= uint64_t(keep) << (at % 64);
      if (at % 64 == 63 || at + 1 == p.size) {
        store_mask(out, p.size, at / 64 * 64, word);
        word = 0;
      }
    }
  }
}

}  // namespace

void random_masks(const RandomMasksParams& p) {
  int64_t varying = 0;
  for (int64_t k = 0; k < p.source.k; ++k) {
    if (p.thresholds[2 * k] == p.thresholds[2 * k + 1]) {
      equal_probability(p, k);
    } else {
      ++varying;
    }
  }
  if (varying == 0 || p.size == 0) return;
  int team = team_size(p.size * p.source.k, p.threads);
  if (team > p.source.k) team = int(p.source.k);
  int64_t room = p.width * 24 + 8;
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
    for (int64_t k = 0; k < p.source.k; ++k) {
      if (p.thresholds[2 * k] == p.thresholds[2 * k + 1]) continue;
      by_rank<decltype(dtype)::value, decltype(experts)::value>(p, k, p.scratch + k * room);
    }
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
