// Vectors of kWidth adjacent elements: loads, conversions to fp32, stores.
//
// A vector of more than one element must start at a multiple of 16 bytes, or of its own size if
// that is smaller. Loads keep the stored bits, so that many can be under way before the first is
// converted. Stores round to nearest even and write one NaN only, the positive quiet one.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

#include "fastmerge/dtype.h"

namespace fastmerge::cuda {

// The bits of kWidth elements of up to 32 bits; 16-bit elements lie in pairs.
template <int kWidth>
struct Bits {
  uint32_t word[kWidth];
};

template <int kWidth>
struct Floats {
  float lane[kWidth];
};

__host__ __device__ constexpr int item_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Elements of a dtype in 16 bytes.
constexpr int full_width(int dtype) { return 16 / item_bytes(dtype); }

// Read-only memory may take the cache that is not kept coherent; what the kernel writes must not.
enum class Memory { kReadOnly, kWritten };

template <Memory kMemory, class T>
__device__ __forceinline__ T read(const void* address) {
  const T* p = static_cast<const T*>(address);
  if constexpr (kMemory == Memory::kReadOnly) return __ldg(p);
  return *p;
}

template <int kDtype, int kWidth, Memory kMemory = Memory::kReadOnly>
__device__ __forceinline__ Bits<kWidth> load_bits(const void* data, int64_t i) {
  constexpr int kBytes = kWidth * item_bytes(kDtype);
  const char* p = static_cast<const char*>(data) + i * item_bytes(kDtype);
  Bits<kWidth> r = {};
  if constexpr (kBytes == 2) {
    r.word[0] = read<kMemory, unsigned short>(p);
  } else if constexpr (kBytes == 4) {
    r.word[0] = read<kMemory, unsigned int>(p);
  } else if constexpr (kBytes == 8) {
    uint2 u = read<kMemory, uint2>(p);
    r.word[0] = u.x, r.word[1] = u.y;
  } else {
#pragma unroll
    for (int j = 0; j < kBytes / 16; ++j) {
      uint4 u = read<kMemory, uint4>(p + 16 * j);
      r.word[4 * j] = u.x, r.word[4 * j + 1] = u.y;
      r.word[4 * j + 2] = u.z, r.word[4 * j + 3] = u.w;
    }
  }
  return r;
}

// Dtypes of the streams that are read or written once per element are tested at run time.
template <int kWidth, Memory kMemory = Memory::kReadOnly>
__device__ __forceinline__ Bits<kWidth> load_bits(const void* data, int64_t i, int dtype) {
  if (dtype == kFloat32) return load_bits<kFloat32, kWidth, kMemory>(data, i);
  return load_bits<kFloat16, kWidth, kMemory>(data, i);
}

template <int kWidth>
__device__ __forceinline__ float element(const Bits<kWidth>& bits, int j, int dtype) {
  if (dtype == kFloat32) return __uint_as_float(bits.word[j]);
  uint32_t pair = bits.word[j / 2];
  uint32_t half = j % 2 == 0 ? pair & 0xffffu : pair >> 16;
  if (dtype == kBFloat16) return __uint_as_float(half << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
}

template <int kWidth>
__device__ __forceinline__ Floats<kWidth> to_floats(const Bits<kWidth>& bits, int dtype) {
  Floats<kWidth> r;
  if (dtype == kFloat32) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) r.lane[j] = element(bits, j, kFloat32);
  } else if (dtype == kFloat16) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) r.lane[j] = element(bits, j, kFloat16);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) r.lane[j] = element(bits, j, kBFloat16);
  }
  return r;
}

__device__ __forceinline__ float canonical_nan(float x) {
  return x == x ? x : __uint_as_float(0x7fc00000u);
}

__device__ __forceinline__ uint32_t float_to_bfloat16(float x) {
  uint32_t u = __float_as_uint(x);
  return x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : 0x7fc0u;
}

__device__ __forceinline__ uint32_t float_to_float16(float x) {
  return x == x ? __half_as_ushort(__float2half_rn(x)) : 0x7e00u;
}

template <int kBytes>
__device__ __forceinline__ void write(char* p, const uint32_t* word) {
  if constexpr (kBytes == 2) {
    *reinterpret_cast<unsigned short*>(p) = static_cast<unsigned short>(word[0]);
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(p) = word[0];
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int j = 0; j < kBytes / 16; ++j) {
      *reinterpret_cast<uint4*>(p + 16 * j) =
          make_uint4(word[4 * j], word[4 * j + 1], word[4 * j + 2], word[4 * j + 3]);
    }
  }
}

template <int kWidth>
__device__ __forceinline__ void store(void* data, int64_t i, const Floats<kWidth>& x, int dtype) {
  char* p = static_cast<char*>(data) + i * item_bytes(dtype);
  uint32_t word[kWidth] = {};
  if (dtype == kFloat32) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) word[j] = __float_as_uint(canonical_nan(x.lane[j]));
    return write<kWidth * 4>(p, word);
  }
  if (dtype == kFloat16) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) word[j / 2] |= float_to_float16(x.lane[j]) << (j % 2 * 16);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) word[j / 2] |= float_to_bfloat16(x.lane[j]) << (j % 2 * 16);
  }
  write<kWidth * 2>(p, word);
}

// A base of null stands for zeros. It may be the output as well.
template <int kWidth>
__device__ __forceinline__ Bits<kWidth> load_base(const void* base, int64_t i, int dtype) {
  return base == nullptr ? Bits<kWidth>{} : load_bits<kWidth, Memory::kWritten>(base, i, dtype);
}

template <int kDtype, bool kExperts, int kWidth>
__device__ __forceinline__ float task_vector(const Bits<kWidth>& delta, const Floats<kWidth>& base,
                                             int j) {
  float x = element(delta, j, kDtype);
  return kExperts ? x - base.lane[j] : x;
}

// Deltas whose loads are under way at once.
constexpr int kGroup = 8;

// Loads vector i of the deltas `first` .. `first` + kGroup - 1 of K.
template <int kDtype, int kWidth>
__device__ __forceinline__ void load_group(Bits<kWidth> (&bits)[kGroup], const void* const* deltas,
                                           int first, int k, int64_t i) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (first + j < k) bits[j] = load_bits<kDtype, kWidth>(deltas[first + j], i);
  }
}

// Their coefficients or thresholds, under way together with them.
__device__ __forceinline__ void load_scalars(float (&scalars)[kGroup], const float* from, int first,
                                             int k) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) scalars[j] = first + j < k ? __ldg(from + first + j) : 0.0f;
}

}  // namespace fastmerge::cuda
