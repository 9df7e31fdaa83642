"""Criteria by name, for the tests that compare with what released implementations gave."""

import monai.losses
import torch
from torch import Tensor, nn


def lovasz(P: Tensor, G: Tensor) -> Tensor:
    """Errors in descending order, weighted by the growth of the Jaccard loss: no sum over pixels can tell."""
    p, g = P.flatten(), G.flatten()
    errors, order = torch.where(g > 0, 1 - p, p).sort(descending=True, stable=True)
    g = g[order]
    jaccard = 1 - (g.sum() - g.cumsum(0)) / (g.sum() + (1 - g).cumsum(0)).clamp(min=1)
    return (errors * jaccard.diff(prepend=jaccard.new_zeros(1))).sum()


CRITERIA = {
    "dice": monai.losses.DiceLoss(),
    "squared": monai.losses.DiceLoss(squared_pred=True, batch=True),
    "jaccard": monai.losses.DiceLoss(jaccard=True),
    "sigmoid": monai.losses.DiceLoss(sigmoid=True),
    "squared sigmoid": monai.losses.DiceLoss(sigmoid=True, squared_pred=True),
    "generalized": monai.losses.GeneralizedDiceLoss(),
    "gdf": monai.losses.GeneralizedDiceFocalLoss(),
    "gdf sigmoid": monai.losses.GeneralizedDiceFocalLoss(sigmoid=True),
    "focal": monai.losses.FocalLoss(gamma=1.5),
    "dicece": monai.losses.DiceCELoss(),
    "dicefocal": monai.losses.DiceFocalLoss(lambda_dice=0.3),
    "tversky": monai.losses.TverskyLoss(alpha=0.3, beta=0.8),
    "bce": nn.BCEWithLogitsLoss(),
    "lovasz": lovasz,
}

# Options of the authors' class, and the criteria that they were tried with.
OPTIONS = {
    "defaults": ({}, tuple(CRITERIA)),
    "tp": ({"instance_wise_loss_no_tp": False}, ("squared sigmoid", "dicefocal", "lovasz")),
    "weighted": ({"weighted_instance_wise": True}, ("dice", "dicefocal", "lovasz")),
    "tp weighted": ({"instance_wise_loss_no_tp": False, "weighted_instance_wise": True}, ("dicefocal",)),
    "rates": ({"rate_instead_number": True, "weighted_fdr": True, "smoother": 1e-3}, ("dice",)),
    "data": ({"instance_wise_reduce": "data", "centroid_offset": 1}, ("dice",)),
    "sum": ({"instance_wise_reduce": "data", "reduce_segmentation": "sum", "centroid_offset": 0}, ("dice",)),
    "threshold": ({"segmentation_threshold": 0.3}, ("dice",)),
    "hard": ({"activation": "sigmoid", "segmentation_threshold": 0.4}, ("dice",)),
}
