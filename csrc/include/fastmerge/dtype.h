#pragma once

namespace fastmerge {

// Storage types of tensors; the numbers are part of the binding's contract.
constexpr int kFloat32 = 0;
constexpr int kFloat16 = 1;
constexpr int kBFloat16 = 2;

// Static: no level's copy may stand in for another's.
static inline constexpr int item_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace fastmerge
