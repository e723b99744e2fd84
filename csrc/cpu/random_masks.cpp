// Random masks: every entry is kept with a probability that may grow with its rank in its row.
//
// Contiguous tensors; masks is overwritten. A draw u of 32 bits keeps its entry where u < T, T =
// 2^32 p. With equal probabilities deltas are not read. Otherwise rank 0 is the smallest |tau| of
// the row, equal magnitudes in the order of their indices, and T grows with the rank. A histogram
// of the row bounds the ranks of each bin, hence T, and nearly all draws are outside of the bounds;
// only the few inside need the rank itself.
#include "combine.h"
#include "kernels.h"
#include "masks.h"
#include "parallel.h"
#include "philox.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

// Ranks looked up by reading the row, a vector at a time, before sorting it is cheaper.
constexpr int kScans = 64;
// Entries of a row for each bin of its histogram.
constexpr int64_t kBinLoad = 4;

void equal_probability(const RandomMasksParams& p, int64_t k) {
  uint64_t threshold = uint64_t(p.thresholds[2 * k] * 0x1p32);
  int64_t words = (p.size + 63) / 64, batches = (words + kWays - 1) / kWays;
  int shift = int(p.offset % kGroupEntries);
  uint64_t group = uint64_t(p.offset) / kGroupEntries;
  uint8_t* row = p.masks + k * mask_bytes(p.size);
  parallel_runs(batches, team_size(p.size, p.threads), [&](int64_t begin, int64_t end) {
    uint64_t word[kWays], next[kWays];
    uint64_t first = group + uint64_t(begin) * kWays;
    draws_below<kWays>(p.key, uint32_t(k), first, threshold, next);
    for (int64_t b = begin; b < end; ++b) {
      memcpy(word, next, sizeof(word));
      if (shift != 0 || b + 1 < end) {
        first = group + uint64_t(b + 1) * kWays;
        draws_below<kWays>(p.key, uint32_t(k), first, threshold, next);
      }
      for (int w = 0; w < kWays && b * kWays + w < words; ++w) {
        uint64_t bits = word[w];
        uint64_t after = w + 1 < kWays ? word[w + 1] : next[0];
        if (shift != 0) bits = (bits >> shift) | (after << (64 - shift));
        store_mask(row, p.size, (b * kWays + w) * 64, bits);
      }
    }
  });
}

FASTMERGE_INLINE PartU gather(const uint32_t* table, PartU index) {
#if defined(__AVX512F__)
  return (PartU)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (PartU)_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), (__m256i)index, 4);
#else
  PartU r;
  for (int lane = 0; lane < kWidth; ++lane) r[lane] = table[index[lane]];
  return r;
#endif
}

// Packed bits appended to a mask, up to sixteen at a time.
struct BitWriter {
  uint8_t* mask;
  int64_t size;
  int64_t done = 0;
  uint64_t word = 0;
  int filled = 0;

  FASTMERGE_INLINE void append(uint32_t bits, int count) {
    word |= uint64_t(bits) << filled;
    filled += count;
    if (filled < 64) return;
    store_mask(mask, size, done, word);
    done += 64;
    filled -= 64;
    word = filled > 0 ? uint64_t(bits) >> (count - filled) : 0;
  }

  void finish() {
    if (filled > 0) store_mask(mask, size, done, word);
  }
};

// One row of magnitudes with what is known of their ranks. Arrays are `padded` long, a whole number
// of vectors.
struct Row {
  uint32_t* magnitude;  // bits of |tau|, in the order of the numbers, NaN last
  uint32_t* bin;
  uint32_t* first;   // [bins + 1], ranks below each bin
  uint32_t* bounds;  // [bins], high 16 bits of T at its lowest and highest rank
  uint32_t* rank;    // valid when sorted
  uint32_t* order;
  uint32_t* spare;
  uint16_t* draws;  // [padded + 2 groups]
  int64_t width;
  int64_t bins;
  int scans;
  bool sorted;
  double low, high, step;

  FASTMERGE_INLINE uint64_t threshold(uint32_t rank) const {
    double share = width > 1 ? double(rank) * step : 0.5;
    return uint64_t((low + (high - low) * share) * 0x1p32);
  }

  void count(F32 largest) {
    float lanes[kLanes], most = 0.0f;
    memcpy(lanes, &largest, sizeof(lanes));
    for (float lane : lanes) most = lane > most ? lane : most;
    float scale = float(bins) / most;
    if (!(scale < 1e30f)) scale = 0.0f;
    F32 factor = broadcast(scale), last = broadcast(float(bins - 1));
    for (int64_t i = 0; i < width; i += kLanes) {
      F32 x = load<kFloat32>(magnitude, i) * factor;  // grows with the magnitude
      x = select(x < last, x, last);
      FASTMERGE_PARTS {
        PartI whole = __builtin_convertvector(x.part[j], PartI);
        memcpy(bin + i + j * kWidth, &whole, sizeof(whole));
      }
    }
    memset(first, 0, (bins + 1) * sizeof(uint32_t));
    for (int64_t i = 0; i < width; ++i) ++first[bin[i] + 1];
    for (int64_t b = 0; b < bins; ++b) first[b + 1] += first[b];
    // In fp32, wider by one on either side than its error.
    float start = float(low * 0x1p16),
          slope = float((high - low) * (width > 1 ? step : 0) * 0x1p16);
    if (width == 1) start += float((high - low) * 0.5 * 0x1p16);
    for (int64_t b = 0; b < bins; ++b) {
      float least = start + slope * float(int32_t(first[b])) - 1.0f;
      float most_of_bin = start + slope * float(int32_t(first[b + 1]) - 1) + 1.0f;
      least = least < 0.0f ? 0.0f : least;
      least = least > 65535.0f ? 65535.0f : least;
      most_of_bin = most_of_bin < 0.0f ? 0.0f : most_of_bin;
      most_of_bin = most_of_bin > 65535.0f ? 65535.0f : most_of_bin;
      bounds[b] = uint32_t(int32_t(least)) | uint32_t(int32_t(most_of_bin)) << 16;
    }
    scans = 0;
    sorted = false;
  }

  uint32_t rank_of(int64_t i) {
    if (!sorted && ++scans > kScans) sort();
    if (sorted) return rank[i];
    uint32_t before = 0, own = magnitude[i];
    for (int64_t j = 0; j < i; ++j) before += magnitude[j] <= own;
    for (int64_t j = i + 1; j < width; ++j) before += magnitude[j] < own;
    return before;
  }

  // Radix sort of the magnitudes' bits, eight at a time; stable.
  void sort() {
    for (int64_t i = 0; i < width; ++i) order[i] = uint32_t(i);
    for (int shift = 0; shift < 32; shift += 8) {
      uint32_t start[257] = {};
      auto digit = [&](uint32_t i) { return (magnitude[i] >> shift) & 255u; };
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

Row make_row(const RandomMasksParams& p, int64_t k) {
  int64_t padded = (p.width + kLanes - 1) / kLanes * kLanes;
  uint32_t* room = reinterpret_cast<uint32_t*>(p.scratch + k * rank_scratch_bytes(p.width));
  Row row = {};
  row.magnitude = room;
  row.bin = room + padded;
  row.rank = room + 2 * padded;
  row.order = room + 3 * padded;
  row.spare = room + 4 * padded;
  row.first = room + 5 * padded;
  row.bounds = room + 6 * padded + 1;
  row.draws = reinterpret_cast<uint16_t*>(room + 7 * padded + 1);
  row.width = p.width;
  row.bins = (p.width + kBinLoad - 1) / kBinLoad;
  row.low = p.thresholds[2 * k];
  row.high = p.thresholds[2 * k + 1];
  row.step = p.width > 1 ? 1.0 / double(p.width - 1) : 0.0;
  return row;
}

template <int kDtype, int kExperts>
F32 read_row(const RandomMasksParams& p, int64_t k, int64_t begin, Row& row) {
  F32 largest = zeros();
  for (int64_t i = 0; i < p.width; i += kLanes) {
    int64_t n = p.width - i < kLanes ? p.width - i : kLanes;
    F32 tau;
    if (n == kLanes) {
      F32 base = kExperts ? load_base(p.source, begin + i) : zeros();
      tau = load_tau<kDtype, kExperts>(p.source, k, begin + i, base);
    } else {
      F32 base = kExperts ? load_base_first(p.source, begin + i, n) : zeros();
      tau = load_tau_first<kDtype, kExperts>(p.source, k, begin + i, n, base);
    }
    F32 x = absolute(canonical_nan(tau));
    largest = select(x > largest, x, largest);
    store<kFloat32>(row.magnitude, i, x);
  }
  return largest;
}

// Whether entry i of the row is kept, where the bounds of its bin leave that open.
bool keep_entry(const RandomMasksParams& p, int64_t k, uint64_t index, int64_t i, uint64_t high,
                Row& row) {
  uint64_t threshold = row.threshold(row.rank_of(i));
  if (high != threshold >> 16) return high < threshold >> 16;
  Halves low[2];  // drawn for the few entries that they decide
  random_halves<1>(p.key, uint32_t(k), true, index / kGroupEntries, low);
  uint16_t halves[kGroupEntries];
  memcpy(halves, low, sizeof(halves));
  return (high << 16 | halves[index % kGroupEntries]) < threshold;
}

template <int kDtype, int kExperts>
void by_rank(const RandomMasksParams& p, int64_t k) {
  Row row = make_row(p, k);
  BitWriter writer = {p.masks + k * mask_bytes(p.size), p.size};
  for (int64_t begin = 0; begin < p.size; begin += p.width) {
    row.count(read_row<kDtype, kExperts>(p, k, begin, row));
    uint64_t index = uint64_t(p.offset + begin), group = index / kGroupEntries;
    int64_t skip = int64_t(index % kGroupEntries);
    for (int64_t d = 0; d < skip + p.width; d += kWays * kGroupEntries) {
      Halves halves[2 * kWays];
      random_halves<kWays>(p.key, uint32_t(k), false, group + uint64_t(d) / kGroupEntries, halves);
      memcpy(row.draws + d, halves, sizeof(halves));
    }
    const uint16_t* draws = row.draws + skip;
    for (int64_t i = 0; i < p.width; i += kLanes) {
      int n = int(p.width - i < kLanes ? p.width - i : kLanes);
      uint32_t keep = 0, unsure = 0;
      FASTMERGE_PARTS {
        PartU bin;
        PartH half;
        memcpy(&bin, row.bin + i + j * kWidth, sizeof(bin));
        memcpy(&half, draws + i + j * kWidth, sizeof(half));
        PartU bounds = gather(row.bounds, bin), draw = widen(half);
        PartI below = (PartI)(draw < (bounds & 0xffffu)), within = (PartI)(draw <= (bounds >> 16));
        keep |= part_bits(below) << (j * kWidth);
        unsure |= part_bits(within & ~below) << (j * kWidth);
      }
      if (n < kLanes) {
        keep &= (1u << n) - 1;
        unsure &= (1u << n) - 1;
      }
      for (; unsure != 0; unsure &= unsure - 1) {
        int64_t e = i + __builtin_ctz(unsure);
        if (keep_entry(p, k, index + uint64_t(e), e, draws[e], row)) keep |= 1u << (e - i);
      }
      writer.append(keep, n);
    }
  }
  writer.finish();
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
  with_source(p.source.delta_dtype, p.source.experts, [&](auto dtype, auto experts) {
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
    for (int64_t k = 0; k < p.source.k; ++k) {
      if (p.thresholds[2 * k] == p.thresholds[2 * k + 1]) continue;
      by_rank<decltype(dtype)::value, decltype(experts)::value>(p, k);
    }
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
