// Sixteen fp32 lanes on top of the compiler's vector extensions, in pieces of the level's width.
//
// Only IEEE multiply, add, subtract, divide, compare and select, and no multiply-add is fused but
// that of multiply_add, which always is, and wide.h's of exact products: every level gives the same
// bytes. Loads widen fp16 and
// bf16 to fp32; stores round to nearest even and write one NaN only, since payloads depend on the
// operand order a compiler happens to choose. No standard C++ library: an inline function of it
// compiled here could be linked into baseline code.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fastmerge/dtype.h"

#ifndef FASTMERGE_LEVEL
#error "FASTMERGE_LEVEL names the namespace of the instruction-set level"
#endif

#define FASTMERGE_INLINE inline __attribute__((always_inline))
#define FASTMERGE_PARTS _Pragma("GCC unroll 4") for (int j = 0; j < kParts; ++j)

namespace fastmerge::cpu::FASTMERGE_LEVEL {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

typedef float PartF __attribute__((vector_size(kWidth * 4)));
typedef int32_t PartI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t PartU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t PartH __attribute__((vector_size(kWidth * 2)));

struct F32 {
  PartF part[kParts];
};

// All bits of a lane set where a condition holds.
struct Mask {
  PartI part[kParts];
};

FASTMERGE_INLINE F32 broadcast(float x) {
  F32 r;
  FASTMERGE_PARTS r.part[j] = x - PartF{};  // not a sum, which would lose the sign of -0
  return r;
}

FASTMERGE_INLINE F32 zeros() { return F32{}; }

#define FASTMERGE_BINARY(op)                            \
  FASTMERGE_INLINE F32 operator op(F32 a, F32 b) {      \
    F32 r;                                              \
    FASTMERGE_PARTS r.part[j] = a.part[j] op b.part[j]; \
    return r;                                           \
  }
FASTMERGE_BINARY(+)
FASTMERGE_BINARY(-)
FASTMERGE_BINARY(*)
FASTMERGE_BINARY(/)
#undef FASTMERGE_BINARY

// a * b + c, rounded once. Slow where the level has no instruction for it.
FASTMERGE_INLINE PartF multiply_add(PartF a, PartF b, PartF c) {
#if defined(__AVX512F__)
  return (PartF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (PartF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int lane = 0; lane < kWidth; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#endif
}

FASTMERGE_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
  F32 r;
  FASTMERGE_PARTS r.part[j] = multiply_add(a.part[j], b.part[j], c.part[j]);
  return r;
}

#define FASTMERGE_COMPARE(op)                           \
  FASTMERGE_INLINE Mask operator op(F32 a, F32 b) {     \
    Mask r;                                             \
    FASTMERGE_PARTS r.part[j] = a.part[j] op b.part[j]; \
    return r;                                           \
  }
FASTMERGE_COMPARE(<)
FASTMERGE_COMPARE(>)
FASTMERGE_COMPARE(>=)
FASTMERGE_COMPARE(==)
FASTMERGE_COMPARE(!=)
#undef FASTMERGE_COMPARE

FASTMERGE_INLINE F32 select(Mask m, F32 a, F32 b) {
  F32 r;
  FASTMERGE_PARTS r.part[j] = m.part[j] ? a.part[j] : b.part[j];
  return r;
}

FASTMERGE_INLINE Mask operator&(Mask a, Mask b) {
  Mask r;
  FASTMERGE_PARTS r.part[j] = a.part[j] & b.part[j];
  return r;
}

FASTMERGE_INLINE Mask operator|(Mask a, Mask b) {
  Mask r;
  FASTMERGE_PARTS r.part[j] = a.part[j] | b.part[j];
  return r;
}

FASTMERGE_INLINE F32 absolute(F32 a) {
  F32 r;
  FASTMERGE_PARTS r.part[j] = (PartF)((PartU)a.part[j] & 0x7fffffffu);
  return r;
}

// One bit per lane, the first lane lowest.
FASTMERGE_INLINE uint32_t part_bits(PartI m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)m));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)m));
#else
  uint32_t r = 0;
  for (int lane = 0; lane < kWidth; ++lane) r |= (m[lane] & 1u) << lane;
  return r;
#endif
}

FASTMERGE_INLINE uint32_t bits(Mask m) {
  uint32_t r = 0;
  FASTMERGE_PARTS r |= part_bits(m.part[j]) << (j * kWidth);
  return r;
}

// GCC would convert AVX-512 vectors in halves.
#if defined(__AVX512F__)
FASTMERGE_INLINE PartU widen(PartH h) { return (PartU)_mm512_cvtepu16_epi32((__m256i)h); }
FASTMERGE_INLINE PartH narrow(PartU u) { return (PartH)_mm512_cvtepi32_epi16((__m512i)u); }
#else
FASTMERGE_INLINE PartU widen(PartH h) { return __builtin_convertvector(h, PartU); }
FASTMERGE_INLINE PartH narrow(PartU u) { return __builtin_convertvector(u, PartH); }
#endif

FASTMERGE_INLINE PartF bfloat16_to_float(PartH h) { return (PartF)(widen(h) << 16); }

FASTMERGE_INLINE PartH float_to_bfloat16(PartF x) {
  PartU u = (PartU)x;
  PartU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return narrow(x == x ? rounded : PartU{} + 0x7fc0u);
}

#if defined(__AVX512F__)
FASTMERGE_INLINE PartF float16_to_float(PartH h) { return (PartF)_mm512_cvtph_ps((__m256i)h); }
FASTMERGE_INLINE PartH float_to_float16_keeping_nan(PartF x) {
  return (PartH)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
FASTMERGE_INLINE PartF float16_to_float(PartH h) { return (PartF)_mm256_cvtph_ps((__m128i)h); }
FASTMERGE_INLINE PartH float_to_float16_keeping_nan(PartF x) {
  return (PartH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
FASTMERGE_INLINE PartF float16_to_float(PartH h) {
  PartU u = widen(h);
  PartU magnitude = u & 0x7fffu;
  PartU normal = (magnitude << 13) + (112u << 23);
  // Hardware conversion makes a signalling NaN quiet and keeps its payload.
  PartU quiet = magnitude > 0x7c00u ? PartU{} + 0x400000u : PartU{};
  PartU special = (magnitude << 13) | 0x7f800000u | quiet;
  // Subnormal halves are multiples of 2^-24, all of them normal in fp32.
  PartU subnormal = (PartU)(__builtin_convertvector((PartI)magnitude, PartF) * 0x1p-24f);
  PartU bits = magnitude >= 0x7c00u ? special : (magnitude < 0x400u ? subnormal : normal);
  return (PartF)(bits | ((u & 0x8000u) << 16));
}
FASTMERGE_INLINE PartH float_to_float16_keeping_nan(PartF x) {
  PartU u = (PartU)x;
  PartU magnitude = u & 0x7fffffffu;
  PartU normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // Adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
  PartU subnormal = (PartU)((PartF)magnitude + 0.5f) - 0x3f000000u;
  PartU bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x47800000u ? PartU{} + 0x7c00u : bits;
  bits = magnitude > 0x7f800000u ? (((magnitude >> 13) & 0x3ffu) | 0x7e00u) : bits;
  return narrow(bits | ((u >> 16) & 0x8000u));
}
#endif

FASTMERGE_INLINE PartF canonical_nan(PartF x) {
  return x == x ? x : (PartF)(PartU{} + 0x7fc00000u);
}

FASTMERGE_INLINE F32 canonical_nan(F32 x) {
  FASTMERGE_PARTS x.part[j] = canonical_nan(x.part[j]);
  return x;
}

template <int kDtype>
FASTMERGE_INLINE F32 load(const void* data, int64_t i) {
  const char* p = static_cast<const char*>(data) + i * item_size(kDtype);
  F32 r;
  FASTMERGE_PARTS {
    if constexpr (kDtype == kFloat32) {
      memcpy(&r.part[j], p + j * sizeof(PartF), sizeof(PartF));
    } else {
      PartH h;
      memcpy(&h, p + j * sizeof(PartH), sizeof(PartH));
      r.part[j] = kDtype == kFloat16 ? float16_to_float(h) : bfloat16_to_float(h);
    }
  }
  return r;
}

template <int kDtype>
FASTMERGE_INLINE PartH to_half(PartF x) {
  return kDtype == kFloat16 ? float_to_float16_keeping_nan(canonical_nan(x)) : float_to_bfloat16(x);
}

template <int kDtype>
FASTMERGE_INLINE void store(void* data, int64_t i, F32 x) {
  char* p = static_cast<char*>(data) + i * item_size(kDtype);
  FASTMERGE_PARTS {
    if constexpr (kDtype == kFloat32) {
      PartF f = canonical_nan(x.part[j]);
      memcpy(p + j * sizeof(PartF), &f, sizeof(PartF));
    } else {
      PartH h = to_half<kDtype>(x.part[j]);
      memcpy(p + j * sizeof(PartH), &h, sizeof(PartH));
    }
  }
}

// Asks for the cache line of element i; an address past the end does no harm.
FASTMERGE_INLINE void prefetch(const void* data, int64_t i, int dtype) {
  __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(data) + i * item_size(dtype)));
}

// The first n lanes; the others are zero.
template <int kDtype>
FASTMERGE_INLINE F32 load_first(const void* data, int64_t i, int64_t n) {
  char buffer[kLanes * 4] = {};
  memcpy(buffer, static_cast<const char*>(data) + i * item_size(kDtype), n * item_size(kDtype));
  return load<kDtype>(buffer, 0);
}

template <int kDtype>
FASTMERGE_INLINE void store_first(void* data, int64_t i, F32 x, int64_t n) {
  char buffer[kLanes * 4];
  store<kDtype>(buffer, 0, x);
  memcpy(static_cast<char*>(data) + i * item_size(kDtype), buffer, n * item_size(kDtype));
}

// Dtypes of the streams that are read or written once per element are tested at run time: the
// branch is the same for a whole tensor and hides behind the K delta reads.
FASTMERGE_INLINE F32 load(const void* data, int64_t i, int dtype) {
  if (dtype == kFloat32) return load<kFloat32>(data, i);
  if (dtype == kFloat16) return load<kFloat16>(data, i);
  return load<kBFloat16>(data, i);
}

FASTMERGE_INLINE void store(void* data, int64_t i, F32 x, int dtype) {
  if (dtype == kFloat32) return store<kFloat32>(data, i, x);
  if (dtype == kFloat16) return store<kFloat16>(data, i, x);
  store<kBFloat16>(data, i, x);
}

FASTMERGE_INLINE F32 load_first(const void* data, int64_t i, int64_t n, int dtype) {
  if (dtype == kFloat32) return load_first<kFloat32>(data, i, n);
  if (dtype == kFloat16) return load_first<kFloat16>(data, i, n);
  return load_first<kBFloat16>(data, i, n);
}

FASTMERGE_INLINE void store_first(void* data, int64_t i, F32 x, int64_t n, int dtype) {
  if (dtype == kFloat32) return store_first<kFloat32>(data, i, x, n);
  if (dtype == kFloat16) return store_first<kFloat16>(data, i, x, n);
  store_first<kBFloat16>(data, i, x, n);
}

// Sum of the lanes in fp64, as a tree that is the same at every level.
FASTMERGE_INLINE double fold(F32 x) {
  float lane[kLanes];
  memcpy(lane, &x, sizeof(lane));
  double sum[kLanes / 2];
  for (int j = 0; j < 8; ++j) sum[j] = double(lane[j]) + double(lane[j + 8]);
  for (int j = 0; j < 4; ++j) sum[j] += sum[j + 4];
  for (int j = 0; j < 2; ++j) sum[j] += sum[j + 2];
  return sum[0] + sum[1];
}

FASTMERGE_INLINE double canonical_nan(double x) { return x == x ? x : __builtin_nan(""); }

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
