"""Instance-level segmentation losses and metrics without a loop over instances.

Losses are modules, `loss(logits, target)`; `fastinstance.functional` has the same without state. `instance_metrics` and
`InstanceMetrics` judge binary predictions. Importing this package touches no GPU and imports neither MONAI nor kornia.
"""

from typing import TYPE_CHECKING, Any

from . import functional
from .backend import use_backend
from .checks import debug_checks
from .componentwise import CCLoss, ComponentMILLoss, ComponentTverskyLoss, LesionRecallLoss
from .ensemble import band_ensemble, majority_vote, volume_ensemble
from .functional import BlobTerms, InstanceTerms, label
from .graphs import make_graphed
from .losses import (
    BlobLoss,
    DetectionLoss,
    DiceCELoss,
    DiceLoss,
    FalseLoss,
    FocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    ICILoss,
    InstanceLoss,
    InverseWeightedDiceLoss,
    ProximityLoss,
    TverskyLoss,
)
from .metrics import instance_metrics
from .ranks import rank_methods
from .regions import voronoi

if TYPE_CHECKING:
    from .accumulate import InstanceMetrics

__version__ = "0.1.0"

__all__ = [
    "BlobLoss",
    "BlobTerms",
    "CCLoss",
    "ComponentMILLoss",
    "ComponentTverskyLoss",
    "DetectionLoss",
    "DiceCELoss",
    "DiceLoss",
    "FalseLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "ICILoss",
    "InstanceLoss",
    "InstanceMetrics",
    "InstanceTerms",
    "InverseWeightedDiceLoss",
    "LesionRecallLoss",
    "ProximityLoss",
    "TverskyLoss",
    "band_ensemble",
    "debug_checks",
    "functional",
    "instance_metrics",
    "label",
    "majority_vote",
    "make_graphed",
    "rank_methods",
    "use_backend",
    "volume_ensemble",
    "voronoi",
]


def __getattr__(name: str) -> Any:
    if name == "InstanceMetrics":  # imports torchmetrics, where it is installed: not before it is asked for
        from .accumulate import InstanceMetrics

        return InstanceMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
