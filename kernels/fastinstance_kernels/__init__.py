"""Triton kernels of fastinstance, each family behind one launcher that takes and returns torch tensors.

Importing the package touches no GPU. The launchers never wait for the device, allocate with `torch.empty`,
and launch a number of kernels that depends on their settings and never on the data: they can be captured in a
CUDA graph.
"""

from .given import number_ids
from .label import label_planes
from .regions import nearest_label

__all__ = ["label_planes", "nearest_label", "number_ids"]
