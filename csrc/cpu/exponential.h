// exp and log as polynomials in plain multiply and add, since a mathematics library may answer
// differently on another machine.
#pragma once

#include "vec.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

// exp(x) is zero in fp32 below this.
constexpr float kUnderflow = -104.0f;

FASTMERGE_INLINE F32 clamp_low(F32 x) {
  F32 low = broadcast(kUnderflow);
  return select(x < low, low, x);
}

// exp(x) for kUnderflow <= x < 88, within 2 ulp: x = n log 2 + r, exp(r) by its series.
FASTMERGE_INLINE F32 exp_clamped(F32 x) {
  F32 magic = broadcast(0x1.8p23f);  // leaves the nearest integer in the low mantissa bits
  F32 shifted = x * broadcast(0x1.715476p0f) + magic;
  F32 n = shifted - magic;
  F32 r = (x - n * broadcast(0x1.62e4p-1f)) - n * broadcast(0x1.7f7d1cp-20f);
  F32 y = broadcast(1.0f / 5040);
  y = y * r + broadcast(1.0f / 720);
  y = y * r + broadcast(1.0f / 120);
  y = y * r + broadcast(1.0f / 24);
  y = y * r + broadcast(1.0f / 6);
  y = y * r + broadcast(0.5f);
  y = y * (r * r) + r + broadcast(1.0f);
  // Two factors, since 2^n alone may be below the normal numbers.
  F32 low, high;
  FASTMERGE_PARTS {
    PartI exponent = (PartI)shifted.part[j] - (PartI)magic.part[j];
    PartI half = exponent >> 1;
    low.part[j] = (PartF)((half + 127) << 23);
    high.part[j] = (PartF)((exponent - half + 127) << 23);
  }
  return select(x == broadcast(kUnderflow), zeros(), y * low * high);
}

// log(x) for normal x > 0, within 2 ulp: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)),
// log(1 + f) = f - f^2 / 2 + f^3 P(f).
FASTMERGE_INLINE F32 log_positive(F32 x) {
  F32 exponent, f;
  FASTMERGE_PARTS {
    PartI u = (PartI)x.part[j];
    PartI e = (u - 0x3f3504f3) >> 23;  // moves the mantissa's interval from [1, 2) to f's
    exponent.part[j] = __builtin_convertvector(e, PartF);
    f.part[j] = (PartF)(u - (e << 23)) - 1.0f;
  }
  F32 p = broadcast(-0x1.38b548p-4f);
  p = p * f + broadcast(0x1.055b6p-3f);
  p = p * f + broadcast(-0x1.0d8548p-3f);
  p = p * f + broadcast(0x1.22da1ep-3f);
  p = p * f + broadcast(-0x1.547244p-3f);
  p = p * f + broadcast(0x1.99a008p-3f);
  p = p * f + broadcast(-0x1.000226p-2f);
  p = p * f + broadcast(0x1.555554p-2f);
  F32 square = f * f;
  F32 small = square * (f * p) - broadcast(0.5f) * square;
  return exponent * broadcast(0x1.62e4p-1f) + (f + (small + exponent * broadcast(0x1.7f7d1cp-20f)));
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
