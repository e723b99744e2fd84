"""The ops: one file each, registered with the torch dispatcher as torch.ops.fastmerge.<name>."""

from .coefficient_grad import coefficient_grad
from .combine_and_dot import combine_and_dot
from .magnitude_threshold import magnitude_threshold
from .merged_linear import merged_linear
from .softmax_entropy import softmax_entropy
from .ties import ties_masks, ties_merge
from .weighted_sum import weighted_sum

__all__ = [
    "coefficient_grad",
    "combine_and_dot",
    "magnitude_threshold",
    "merged_linear",
    "softmax_entropy",
    "ties_masks",
    "ties_merge",
    "weighted_sum",
]
