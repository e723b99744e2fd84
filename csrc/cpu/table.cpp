#include "kernels.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

const KernelTable kTable = {
    weighted_sum, coefficient_grad, combine_and_dot, magnitude_histogram,
    ties_merge,   ties_masks,       softmax_entropy, softmax_entropy_backward,
};

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
