"""The networks of the study: 2D, from slices to logits of the same size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastinstance.study.config import SwinUNETRConfig, UNetConfig
from fastinstance.study.subjects import StudyError

__all__ = ["SliceNetwork", "build_network"]


class SliceNetwork(nn.Module):
    """A network that takes slices of any size.

    Those that the network itself cannot take are continued below and to the right by their last rows and columns, and
    the logits cut off again.

    Args:
        network: `[B, C, Y, X]` to `[B, 1, Y, X]`.
        multiple: what its sizes must be a multiple of; at least twice as much, since its norms need two pixels.
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 1, Y, X]` of images `[B, C, Y, X]`."""
        height, width = images.shape[-2:]
        down, right = (max(2 * self.multiple, size + -size % self.multiple) - size for size in (height, width))
        if not down and not right:
            return self.network(images)
        padded = F.pad(images, (0, right, 0, down), mode="replicate")
        return self.network(padded)[..., :height, :width]


def build_network(config: UNetConfig | SwinUNETRConfig, channels: int, *, seed: int = 0) -> SliceNetwork:
    """A new network, the same for the same seed.

    Args:
        config: of `[network]`.
        channels: C of the images.
        seed: of its weights.

    Raises:
        StudyError: a package that is missing.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _unet(config, channels) if isinstance(config, UNetConfig) else _swin_unetr(config, channels)
    except ImportError as error:
        name = error.name or "monai"
        raise StudyError(f"the network {config.name} needs {name}: pip install 'fastinstance[study]'") from error


def _unet(config: UNetConfig, channels: int) -> SliceNetwork:
    from monai.networks.nets.unet import UNet

    steps = len(config.channels) - 1
    network = UNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=1,
        channels=config.channels,
        strides=(2,) * steps,
        num_res_units=config.residual_units,
        dropout=config.dropout,
    )
    return SliceNetwork(network, 2**steps)


def _swin_unetr(config: SwinUNETRConfig, channels: int) -> SliceNetwork:
    from monai.networks.nets.swin_unetr import SwinUNETR

    network = SwinUNETR(
        channels,
        1,
        spatial_dims=2,
        feature_size=config.feature_size,
        depths=config.depths,
        num_heads=config.heads,
        drop_rate=config.dropout,
        use_checkpoint=config.checkpointing,
    )
    return SliceNetwork(network, 32)
