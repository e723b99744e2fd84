// The kernels of one instruction-set level.
#pragma once

#include "fastmerge/cpu.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

void weighted_sum(const WeightedSumParams& p);
void coefficient_grad(const CoefficientGradParams& p);
void combine_and_dot(const CombineAndDotParams& p);

extern const KernelTable kTable;

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
