// Packed masks: entry i of a tensor is bit i % 8 of byte i / 8, unused bits are 0.
#pragma once

#include <stdint.h>

#include "parallel.h"
#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

constexpr int64_t mask_bytes(int64_t size) { return (size + 7) / 8; }

// Writes up to 64 entries from entry i, a multiple of 8; entries past `size` are written as 0.
FASTMERGE_INLINE void store_mask(uint8_t* mask, int64_t size, int64_t i, uint64_t word) {
  int64_t left = size - i;
  if (left < 64) word &= (uint64_t(1) << left) - 1;
  int64_t bytes = left < 64 ? mask_bytes(left) : 8;
  memcpy(mask + i / 8, &word, bytes);
}

// The sixteen entries from entry i on, wherever i is; those past `size` may be anything.
FASTMERGE_INLINE uint32_t load_mask(const uint8_t* mask, int64_t size, int64_t i) {
  uint32_t word = 0;
  int64_t left = mask_bytes(size) - i / 8;
  if (left >= 4) {
    memcpy(&word, mask + i / 8, 4);
  } else {
    memcpy(&word, mask + i / 8, left);
  }
  return (word >> (i % 8)) & 0xffffu;
}

FASTMERGE_INLINE Mask expand(uint32_t bits) {
  Mask r;
  FASTMERGE_PARTS {
    PartU lane;
    for (int l = 0; l < kWidth; ++l) lane[l] = 1u << (j * kWidth + l);
    r.part[j] = (PartI)(((PartU{} + bits) & lane) != 0);
  }
  return r;
}

// a where the first sixteen bits are set, else b.
FASTMERGE_INLINE F32 select(uint32_t bits, F32 a, F32 b) {
#if defined(__AVX512F__)
  b.part[0] = (PartF)_mm512_mask_blend_ps(__mmask16(bits), (__m512)b.part[0], (__m512)a.part[0]);
  return b;
#else
  return select(expand(bits), a, b);
#endif
}

// Entries [begin, end) of a tensor, a part of one row; the mask of its first entry starts at byte
// `byte` of a task's masks.
struct MaskSpan {
  int64_t block;
  int64_t begin;
  int64_t end;
  int64_t byte;
};

// Calls body(MaskSpan) for every block of every row.
template <class Body>
inline void for_each_mask_block(MaskRows shape, int threads, Body body) {
  shape = joined_rows(shape);
  int64_t row_blocks = block_count(shape.columns), row_bytes = mask_bytes(shape.columns);
  int team = team_size(shape.rows * shape.columns, threads);
  parallel_runs(shape.rows * row_blocks, team, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int64_t row = b / row_blocks, begin = b % row_blocks * kBlock;
      int64_t end = begin + kBlock < shape.columns ? begin + kBlock : shape.columns;
      int64_t start = row * shape.columns;
      body(MaskSpan{b, start + begin, start + end, row * row_bytes + begin / 8});
    }
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
