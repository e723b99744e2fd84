// Packed masks: entry i of a tensor is bit i % 8 of byte i / 8, unused bits are 0.
#pragma once

#include <stdint.h>

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

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
