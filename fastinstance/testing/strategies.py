"""Scenes and masks drawn by Hypothesis, and the patterns and memory layouts that they have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["FLOATS", "LAYOUTS", "PATTERNS", "Scene", "masks", "pattern", "scenes", "with_layout"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Every dtype a loss input may have; the first is the one Hypothesis shrinks to."""

LAYOUTS = ("contiguous", "channels_last", "strided", "transposed")
"""Names that `with_layout` knows."""

PATTERNS = ("empty", "full", "specks", "checkerboard", "stripes", "diagonals", "nested", "comb", "spiral")
"""Names that `pattern` knows."""


@dataclass(frozen=True, eq=False, repr=False)
class Scene:
    """One input and target of a loss.

    input          [B, C, *S] logits (or probabilities, where they were asked for), any float dtype
    target         [B, C, *S] 0 or 1, any dtype
    target_labels  [B, C, *S] annotated ids, 0 = background, or None; gaps and touching instances are usual
    valid_mask     [B, 1, *S] or None
    spacing        size of a pixel along each axis, or None

    `str(scene)` draws every plane: the target (or its ids) beside the input values.
    """

    input: Tensor
    target: Tensor
    target_labels: Tensor | None = None
    valid_mask: Tensor | None = None
    spacing: tuple[float, ...] | None = None

    @property
    def kwargs(self) -> dict[str, Tensor]:
        """The optional tensors that are there: `loss(scene.input, scene.target, **scene.kwargs)`."""
        optional = {"target_labels": self.target_labels, "valid_mask": self.valid_mask}
        return {name: tensor for name, tensor in optional.items() if tensor is not None}

    def leaf(self, dtype: torch.dtype | None = None) -> Tensor:
        """The input as a new leaf that requires grad, in its own memory layout unless the dtype changes."""
        return self.input.detach().to(dtype or self.input.dtype).requires_grad_()

    def map(self, change: Callable[[Tensor], Tensor]) -> Scene:
        """The scene with `change` applied to every tensor it has."""
        tensors = {"input": self.input, "target": self.target, **self.kwargs}
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def reorder(self, order: Sequence[int]) -> Scene:
        """The images of the batch in another order."""
        return self.map(lambda tensor: tensor[list(order)])

    def flip(self, axes: Sequence[int]) -> Scene:
        """Every tensor flipped along these axes (axes of the tensor: 2 is the first spatial one)."""
        return self.map(lambda tensor: tensor.flip(tuple(axes)))

    def to(self, dtype: torch.dtype) -> Scene:
        """The input in another dtype; the rest as it is."""
        return dataclasses.replace(self, input=self.input.to(dtype))

    def layout(self, name: str) -> Scene:
        """Every tensor in another memory layout, values unchanged."""
        return self.map(lambda tensor: with_layout(tensor, name))

    def __repr__(self) -> str:
        return "\n".join(_describe(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # Hypothesis prints a failing example through this hook and would otherwise list the fields.
        printer.text(repr(self))


def _describe(scene: Scene) -> Iterator[str]:
    dtype = str(scene.input.dtype).removeprefix("torch.")
    strided = "" if scene.input.is_contiguous() else f", strides {tuple(scene.input.stride())}"
    extra = "" if scene.spacing is None else f", spacing {scene.spacing}"
    target = f"target {list(scene.target.shape)} {str(scene.target.dtype).removeprefix('torch.')}"
    yield f"Scene: input {list(scene.input.shape)} {dtype}{strided}, {target}{extra}"
    for image in range(scene.input.shape[0]):
        for channel in range(scene.input.shape[1]):
            # A target of one channel serves every channel of the input.
            shown = min(channel, scene.target.shape[1] - 1)
            marks = (scene.target if scene.target_labels is None else scene.target_labels)[image, shown]
            values = scene.input[image, channel]
            if values.numel() > 512:
                inside = int((scene.target[image, shown] != 0).sum())
                yield f"  image {image}, channel {channel}: {inside} target pixels (too large to draw)"
                continue
            valid = None if scene.valid_mask is None else scene.valid_mask[image, 0] != 0
            yield f"  image {image}, channel {channel}: target | input" + ("" if valid is None else " (x: not valid)")
            rows = [_row(marks, values, valid, index) for index in _row_indices(values.shape)]
            width = max(len(left) for left, _ in rows)
            for (left, right), index in zip(rows, _row_indices(values.shape), strict=True):
                if values.ndim > 2 and index[-1] == 0:
                    yield f"    slice {index[:-1]}"
                yield f"    {left:>{width}} | {right}"


def _row_indices(shape: torch.Size) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape[:-1])))


def _row(marks: Tensor, values: Tensor, valid: Tensor | None, index: tuple[int, ...]) -> tuple[str, str]:
    def mark(column: int) -> str:
        if valid is not None and not valid[index][column]:
            return "x"
        value = marks[index][column].item()
        return "." if value == 0 else f"{value:g}"

    columns = range(values.shape[-1])
    left = " ".join(mark(column) for column in columns)
    right = " ".join(f"{values[index][column].item():8.5g}" for column in columns)
    return left, right


def with_layout(tensor: Tensor, name: str) -> Tensor:
    """`tensor` [B, C, *S] with the same values in another memory layout, one of `LAYOUTS`.

    "strided" leaves gaps, filled with NaN where the dtype has it, and "transposed" swaps the last two axes in
    memory. Raises ValueError for a name that is not in `LAYOUTS`.
    """
    if name == "contiguous":
        return tensor.contiguous()
    if name == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if name == "strided":
        gap = float("nan") if tensor.is_floating_point() else 1
        wide = torch.full((*tensor.shape, 2), gap, dtype=tensor.dtype, device=tensor.device)
        wide[..., 1] = tensor
        return wide[..., 1]
    if name == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(f"expected layout to be one of {LAYOUTS}, got {name!r}")


def pattern(name: str, shape: Sequence[int]) -> Tensor:
    """A bool mask of this shape (two or three axes), the same every time, that a labeller finds hard.

    "specks" has the most components a plane can hold (every other pixel of every axis), "nested" has shells
    inside shells, the teeth of "comb" meet only in the last row, "spiral" is one arm. In 3D comb and spiral
    fill every other slice, joined by a post. Raises ValueError for a name that is not in `PATTERNS`.
    """
    axes = torch.meshgrid(*(torch.arange(side) for side in shape), indexing="ij")
    if name == "empty":
        return torch.zeros(*shape, dtype=torch.bool)
    if name == "full":
        return torch.ones(*shape, dtype=torch.bool)
    if name == "specks":
        return torch.stack([axis % 2 == 0 for axis in axes]).all(0)
    if name == "checkerboard":
        return sum(axes) % 2 == 0  # pyright: ignore[reportReturnType]  # a sum of tensors
    if name == "stripes":
        return axes[-1] % 2 == 0
    if name == "diagonals":
        return sum(axes) % 3 == 0  # pyright: ignore[reportReturnType]
    if name == "nested":
        depth = [torch.minimum(axis, side - 1 - axis) for axis, side in zip(axes, shape, strict=True)]
        return torch.stack(depth).amin(0) % 2 == 0
    if name in ("comb", "spiral"):
        flat = _comb(*shape[-2:]) if name == "comb" else _spiral(*shape[-2:])
        mask = flat.expand(*shape).clone()
        for axis, side in zip(axes[:-2], shape[:-2], strict=True):
            mask &= (axis % 2 == 0) & torch.ones(side, 1, 1, dtype=torch.bool)
            mask[..., 0, 0] = True
        return mask
    raise ValueError(f"expected pattern to be one of {PATTERNS}, got {name!r}")


def _comb(height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, ::2] = True
    mask[-1] = True
    return mask


def _spiral(height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)

    def is_set(row: int, column: int) -> bool:
        return 0 <= row < height and 0 <= column < width and bool(mask[row, column])

    row, column, down, right, turns = 0, 0, 0, 1, 0
    mask[0, 0] = True
    while turns < 2:
        ahead = row + down, column + right
        inside = 0 <= ahead[0] < height and 0 <= ahead[1] < width
        if inside and not is_set(*ahead) and not is_set(ahead[0] + down, ahead[1] + right):
            row, column = ahead
            mask[ahead] = True
            turns = 0
        else:
            down, right = right, -down
            turns += 1
    return mask


@st.composite
def _shapes(draw: st.DrawFn, dims: Sequence[int], max_side: int | None) -> tuple[int, ...]:
    ndim = draw(st.sampled_from(tuple(dims)))
    side = st.integers(1, max_side or (9 if ndim == 2 else 4))
    return tuple(draw(side) for _ in range(ndim))


def _random(draw: st.DrawFn, shape: Sequence[int], high: int) -> Tensor:
    """Integers in [0, high) per pixel; Hypothesis shrinks them to 0 one by one."""
    count = torch.Size(shape).numel()
    drawn = draw(st.binary(min_size=count, max_size=count))
    return torch.tensor(list(drawn), dtype=torch.int64).view(*shape) % high


def _box(shape: Sequence[int], corner: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(max(0, start), max(0, min(side, start + length)))
        for side, start, length in zip(shape, corner, size, strict=True)
    )


_ROLES = ("hit", "missed", "false", "shifted", "grown", "split")


@st.composite
def _pairs(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Target and predicted mask of a plane; hits, misses, false ones, splits and merges all occur often."""
    kind = draw(st.sampled_from(("pixels", "objects", "patterns")))
    if kind == "pixels":
        noise = _random(draw, shape, 256)
        both = noise >= 224
        return (noise % 4 == 3) | both, (noise // 4 % 4 == 3) | both
    if kind == "patterns":
        target = draw(masks(shape))
        relation = draw(st.sampled_from(("other", "rolled", "inverted")))
        if relation == "inverted":
            return target, ~target
        return target, draw(masks(shape)) if relation == "other" else target.roll(1, -1)
    target, predicted = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    corners = st.tuples(*(st.integers(0, side - 1) for side in shape))
    sizes = st.tuples(*(st.integers(1, 4) for _ in shape))
    for role, corner, size in draw(st.lists(st.tuples(st.sampled_from(_ROLES), corners, sizes), max_size=5)):
        here = _box(shape, corner, size)
        if role != "false":
            target[here] = True
        if role == "shifted":
            predicted[_box(shape, [start + 1 for start in corner], size)] = True
        elif role == "grown":
            predicted[_box(shape, [start - 1 for start in corner], [length + 2 for length in size])] = True
        elif role != "missed":
            predicted[here] = True
        if role == "split":
            predicted[..., min(corner[-1] + 1, shape[-1] - 1)] = False
    return target, predicted


def masks(shape: Sequence[int]) -> st.SearchStrategy[Tensor]:
    """Bool masks of this shape: every `pattern`, its shifted and inverted copies, and loose pixels."""

    @st.composite
    def mask(draw: st.DrawFn) -> Tensor:
        name = draw(st.sampled_from(("pixels", *PATTERNS)))
        if name == "pixels":
            return _random(draw, shape, draw(st.integers(2, 4))) == 1
        drawn = pattern(name, shape).roll(draw(st.integers(0, 2)), draw(st.integers(0, len(shape) - 1)))
        return drawn if draw(st.booleans()) else ~drawn

    return mask()


@st.composite
def _logits(draw: st.DrawFn, predicted: Tensor, extreme: bool) -> Tensor:
    """Float64 logits, >= 0 just where predicted. Multiples of 1/16 up to 6, and 80: exact in every dtype."""
    size = draw(st.sampled_from(("flat", "noise", "threshold", "extreme") if extreme else ("flat", "noise")))
    if size == "flat":
        return torch.where(predicted, 2.0, -2.0).double()
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    magnitude = torch.randint(1, 97, predicted.shape, generator=chance).double() / 16
    chosen = torch.randint(0, 2, predicted.shape, generator=chance) == 1
    if size == "threshold":
        magnitude[chosen & predicted] = 0.0
    elif size == "extreme":
        magnitude[chosen] = 80.0
    return torch.where(predicted, magnitude, -magnitude)


@st.composite
def _labels(draw: st.DrawFn, target: Tensor) -> Tensor:
    """Ids for a binary target [B, C, *S]: diagonal bands, so instances touch, and one id may be in pieces."""
    highest = 2**31 - 1
    ids = draw(st.lists(st.integers(1, highest) | st.integers(1, 9), min_size=1, max_size=4, unique=True))
    width = draw(st.integers(1, 4))
    band = torch.stack(torch.meshgrid(*(torch.arange(side) for side in target.shape[2:]), indexing="ij")).sum(0)
    wide = torch.tensor(ids)[(band // width) % len(ids)] * target.long()
    narrow = torch.int32 if max(ids) > 255 else torch.uint8
    return wide.to(draw(st.sampled_from((torch.int64, torch.int32, narrow))))


@st.composite
def scenes(
    draw: st.DrawFn,
    *,
    dims: Sequence[int] = (2, 3),
    max_side: int | None = None,
    max_batch: int = 2,
    channels: tuple[int, int] = (1, 2),
    dtypes: Sequence[torch.dtype] = FLOATS,
    target_dtypes: Sequence[torch.dtype] = (torch.float32, torch.bool, torch.uint8, torch.int64),
    layouts: Sequence[str] = LAYOUTS,
    probabilities: bool = False,
    extreme: bool = True,
    labels: bool = False,
    valid: bool = False,
    spacing: bool = False,
) -> Scene:
    """Scenes from one pixel up: empty, full, touching, nested, spirals, combs, specks, shifted copies, noise.

    `max_side` is 9 in 2D and 4 in 3D unless given. `channels` is the least and the most. `labels`, `valid`
    and `spacing` allow (not force) `target_labels`, `valid_mask` and anisotropic `spacing`. Without `extreme`
    no logit is 0 (exactly at the threshold) or 80 in size. Logits are exact in every float dtype.
    Everything shrinks towards one dark pixel.
    """
    shape = draw(_shapes(dims, max_side))
    batch, width = draw(st.integers(1, max_batch)), draw(st.integers(*channels))
    planes = [draw(_pairs(shape)) for _ in range(batch * width)]
    size = batch, width, *shape
    target = torch.stack([target for target, _ in planes]).view(size)
    logits = torch.stack([draw(_logits(predicted, extreme)) for _, predicted in planes]).view(size)
    scene = Scene(
        input=(logits.sigmoid() if probabilities else logits).to(draw(st.sampled_from(tuple(dtypes)))),
        target=target.to(draw(st.sampled_from(tuple(target_dtypes)))),
        target_labels=draw(_labels(target)) if labels and draw(st.booleans()) else None,
        valid_mask=_random(draw, (batch, 1, *shape), 4) != 3 if valid and draw(st.booleans()) else None,
        spacing=tuple(draw(st.sampled_from((1.0, 0.5, 3.25))) for _ in shape)
        if spacing and draw(st.booleans())
        else None,
    )
    return scene.layout(draw(st.sampled_from(tuple(layouts))))
