"""The CUDA kernels as functions of tensors, with the signatures and contracts of the CPU's.

Callers pass contiguous CUDA tensors of one device whose shapes and dtypes they have checked.
Work is queued on the device's current stream; nothing waits for it, so calls can be captured in a
CUDA graph. Tensors of one argument that differ in dtype are widened to fp32 first, which is exact.
More than 256 deltas are a ValueError.
"""

from . import calls
from .calls import unavailable_reason
from .coefficient_grad import coefficient_grad
from .combine_and_dot import combine_and_dot
from .elect import elect
from .magnitude_histogram import magnitude_histogram, magnitude_threshold
from .masked_combine import masked_combine
from .ties import ties_masks, ties_merge
from .weighted_sum import weighted_sum
