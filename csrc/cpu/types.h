// From run-time dtype codes to template arguments.
#pragma once

#include "fastmerge/dtype.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Constant<dtype>).
template <class F>
inline void with_dtype(int dtype, F f) {
  if (dtype == kFloat32) return f(Constant<kFloat32>{});
  if (dtype == kFloat16) return f(Constant<kFloat16>{});
  f(Constant<kBFloat16>{});
}

// Calls f(Constant<delta dtype>, Constant<experts>).
template <class F>
inline void with_source(int delta_dtype, bool experts, F f) {
  with_dtype(delta_dtype, [&](auto dtype) {
    if (experts) return f(dtype, Constant<1>{});
    f(dtype, Constant<0>{});
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
