// base + sum_k lambda_k (unified where mask_k), the inner products <G, unified where mask_k>, or
// both of one panel.
//
// Contiguous tensors. Additions go in the order of k; products of a tile are summed in sixteen fp32
// lanes and folded into fp64.
#include "combine.h"
#include "kernels.h"
#include "masks.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {
namespace {

constexpr int kMixed = -1;  // base, unified and out of different dtypes

template <int kDtype>
FASTMERGE_INLINE F32 read(const void* data, int64_t i, int64_t n, int dtype) {
  if (n < kLanes) return load_first(data, i, n, dtype);
  if constexpr (kDtype != kMixed) return load<kDtype>(data, i);
  return load(data, i, dtype);
}

template <int kDtype>
FASTMERGE_INLINE void write(void* data, int64_t i, F32 x, int64_t n, int dtype) {
  if (n < kLanes) return store_first(data, i, x, n, dtype);
  if constexpr (kDtype != kMixed) return store<kDtype>(data, i, x);
  store(data, i, x, dtype);
}

// Entries [begin, end), whose masks start at `byte`.
template <int kDtype>
inline void combine_range(const MaskedCombineParams& p, int64_t begin, int64_t end, int64_t byte) {
  auto base_at = [&](int64_t i, int64_t n) {
    return p.base == nullptr ? zeros() : read<kDtype>(p.base, i, n, p.base_dtype);
  };
  int64_t i = begin;
  for (; i + kStrip * kLanes <= end; i += kStrip * kLanes) {
    F32 sum[kStrip], unified[kStrip];
    for (int v = 0; v < kStrip; ++v) {
      sum[v] = base_at(i + v * kLanes, kLanes);
      unified[v] = read<kDtype>(p.unified, i + v * kLanes, kLanes, p.unified_dtype);
    }
    int64_t at = byte + (i - begin) / 8;
    for (int64_t k = 0; k < p.k; ++k) {
      F32 coefficient = broadcast(p.coefficients[k]);
      uint64_t word = 0;
      memcpy(&word, p.masks[k] + at, kStrip * kLanes / 8);
      for (int v = 0; v < kStrip; ++v) {
        sum[v] = select(uint32_t(word >> (v * kLanes)), sum[v] + coefficient * unified[v], sum[v]);
      }
    }
    for (int v = 0; v < kStrip; ++v) {
      write<kDtype>(p.out, i + v * kLanes, sum[v], kLanes, p.out_dtype);
    }
  }
  for (; i < end; i += kLanes) {
    int64_t n = end - i < kLanes ? end - i : kLanes;
    F32 sum = base_at(i, n), unified = read<kDtype>(p.unified, i, n, p.unified_dtype);
    for (int64_t k = 0; k < p.k; ++k) {
      uint32_t word = load_mask(p.masks[k] + byte, end - begin, i - begin);
      sum = select(word, sum + broadcast(p.coefficients[k]) * unified, sum);
    }
    write<kDtype>(p.out, i, sum, n, p.out_dtype);
  }
}

// Adds the products of a tile of at most kTile entries to dots [K].
inline void dot_tile(const MaskedCombineParams& p, int64_t begin, int64_t end, int64_t byte,
                     double* dots) {
  float products[kTile];
  for (int64_t i = begin; i < end; i += kLanes) {
    int64_t n = end - i < kLanes ? end - i : kLanes;
    F32 product =
        read<kMixed>(p.grad, i, n, p.grad_dtype) * read<kMixed>(p.unified, i, n, p.unified_dtype);
    memcpy(products + (i - begin), &product, sizeof(product));
  }
  for (int64_t k = 0; k < p.k; ++k) {
    const uint8_t* mask = p.masks[k] + byte;
    F32 sum = zeros();
    for (int64_t i = 0; i < end - begin; i += kLanes) {
      F32 product;
      memcpy(&product, products + i, sizeof(product));
      sum = select(load_mask(mask, end - begin, i), sum + product, sum);
    }
    dots[k] += fold(sum);
  }
}

template <int kDtype>
inline void combine(const MaskedCombineParams& p) {
  for_each_mask_block(p.shape, p.threads, [&](MaskSpan span) {
    if (p.grad == nullptr) return combine_range<kDtype>(p, span.begin, span.end, span.byte);
    double* dots = p.scratch + span.block * p.k;
    for (int64_t k = 0; k < p.k; ++k) dots[k] = 0;
    for (int64_t begin = span.begin; begin < span.end; begin += kTile) {
      int64_t end = begin + kTile < span.end ? begin + kTile : span.end;
      int64_t byte = span.byte + (begin - span.begin) / 8;
      dot_tile(p, begin, end, byte, dots);
      if (p.out != nullptr) combine_range<kDtype>(p, begin, end, byte);
    }
  });
}

}  // namespace

void masked_combine(const MaskedCombineParams& p) {
  bool mixed = p.unified_dtype != p.out_dtype || p.unified_dtype != p.base_dtype;
  if (mixed) {
    combine<kMixed>(p);
  } else {
    with_dtype(p.unified_dtype, [&](auto dtype) { combine<decltype(dtype)::value>(p); });
  }
  if (p.grad != nullptr) sum_partials(p.scratch, mask_blocks(p.shape), p.k, p.dots);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
