#include "kernels.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

const KernelTable kTable = {weighted_sum, coefficient_grad, combine_and_dot};

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
