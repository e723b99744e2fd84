// Sixteen fp64 lanes, for sums that fp32 lanes would round too early.
#pragma once

#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

typedef double PartD __attribute__((vector_size(kWidth * 4)));
typedef float HalfF __attribute__((vector_size(kWidth * 2)));

struct F64 {
  PartD part[2 * kParts];
};

#define FASTMERGE_WIDE _Pragma("GCC unroll 8") for (int j = 0; j < 2 * kParts; ++j)

// GCC would convert AVX-512 vectors in quarters.
#if defined(__AVX512F__)
FASTMERGE_INLINE PartD widen(HalfF x) { return (PartD)_mm512_cvtps_pd((__m256)x); }
#else
FASTMERGE_INLINE PartD widen(HalfF x) { return __builtin_convertvector(x, PartD); }
#endif

FASTMERGE_INLINE F64 widen(F32 x) {
  HalfF half[2 * kParts];
  memcpy(half, &x, sizeof(half));
  F64 r;
  FASTMERGE_WIDE r.part[j] = widen(half[j]);
  return r;
}

FASTMERGE_INLINE F64 operator+(F64 a, F64 b) {
  FASTMERGE_WIDE a.part[j] = a.part[j] + b.part[j];
  return a;
}

FASTMERGE_INLINE F64 operator*(F64 a, F64 b) {
  FASTMERGE_WIDE a.part[j] = a.part[j] * b.part[j];
  return a;
}

// sum + a b for a and b that were fp32: fp64 holds their product exactly, so that one instruction
// which rounds once gives the bytes of two.
FASTMERGE_INLINE F64 add_product(F64 sum, F64 a, F64 b) {
#if defined(__AVX512F__)
  FASTMERGE_WIDE sum.part[j] =
      (PartD)_mm512_fmadd_pd((__m512d)a.part[j], (__m512d)b.part[j], (__m512d)sum.part[j]);
#elif defined(__FMA__)
  FASTMERGE_WIDE sum.part[j] =
      (PartD)_mm256_fmadd_pd((__m256d)a.part[j], (__m256d)b.part[j], (__m256d)sum.part[j]);
#else
  sum = sum + a * b;
#endif
  return sum;
}

// Sum of the lanes, as a tree that is the same at every level.
FASTMERGE_INLINE double fold(F64 x) {
  double sum[kLanes];
  memcpy(sum, &x, sizeof(sum));
  for (int j = 0; j < 8; ++j) sum[j] += sum[j + 8];
  for (int j = 0; j < 4; ++j) sum[j] += sum[j + 4];
  for (int j = 0; j < 2; ++j) sum[j] += sum[j + 2];
  return canonical_nan(sum[0] + sum[1]);
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
