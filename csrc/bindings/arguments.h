// What both doors check of their arguments, and how integers become pointers.
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "fastmerge/dtype.h"

namespace fastmerge::bindings {

using Addresses = std::vector<uintptr_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline std::vector<const void*> pointers(const Addresses& addresses) {
  std::vector<const void*> result;
  result.reserve(addresses.size());
  for (uintptr_t address : addresses) result.push_back(pointer<const void>(address));
  return result;
}

inline std::vector<void*> mutable_pointers(const Addresses& addresses) {
  std::vector<void*> result;
  result.reserve(addresses.size());
  for (uintptr_t address : addresses) result.push_back(pointer<void>(address));
  return result;
}

inline void expect_count(const char* name, size_t found, size_t expected) {
  if (found != expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                                " pointers, found " + std::to_string(found));
  }
}

inline void expect_dtype(const char* name, int dtype) {
  if (dtype < kFloat32 || dtype > kBFloat16) {
    throw std::invalid_argument(std::string(name) + ": expected dtype code 0, 1 or 2, found " +
                                std::to_string(dtype));
  }
}

inline void expect_merge(int merge) {
  if (merge < 0 || merge > 2) {
    throw std::invalid_argument("merge: expected 0, 1 or 2, found " + std::to_string(merge));
  }
}

}  // namespace fastmerge::bindings
