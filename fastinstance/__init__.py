"""Instance-level segmentation losses without a loop over instances.

Losses are modules, `loss(logits, target)`; `fastinstance.functional` has the same without state. Importing this package
touches no GPU and imports neither MONAI nor kornia.
"""

from . import functional
from .backend import use_backend
from .checks import debug_checks
from .componentwise import CCLoss, ComponentMILLoss, ComponentTverskyLoss, LesionRecallLoss
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
from .regions import voronoi

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
    "InstanceTerms",
    "InverseWeightedDiceLoss",
    "LesionRecallLoss",
    "ProximityLoss",
    "TverskyLoss",
    "debug_checks",
    "functional",
    "label",
    "make_graphed",
    "use_backend",
    "voronoi",
]
