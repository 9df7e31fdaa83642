"""Scenes drawn by Hypothesis, a comparison that says where, and `check_loss` for a loss of your own.

Needs Hypothesis (`pip install "fastinstance[test]"`). Nothing else in the package imports this module, and it
imports nothing else of the package: a checker must not share code with what it checks.

    from fastinstance.testing import check_loss
    check_loss(my_loss)                          # my_loss(input, target) -> scalar, on logits

    from hypothesis import given
    from fastinstance.testing import scenes

    @given(scenes(dims=(2,)))
    def test_mine(scene): ...
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor

__all__ = [
    "FLOATS",
    "LAYOUTS",
    "PATTERNS",
    "PROPERTIES",
    "Scene",
    "assert_close",
    "check_loss",
    "masks",
    "pattern",
    "scenes",
    "with_layout",
]

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


# rtol, atol. Half precision: a value computed in float32 and rounded once, with room for one more rounding.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}


def assert_close(
    actual: Any,
    expected: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    relative_to: str = "each",
    name: str = "value",
) -> None:
    """Raise AssertionError, saying which term and where, unless every value is close.

    Takes tensors, numbers, None, and mappings, named tuples and sequences of them (alike on both sides).
    Allowed is `atol + rtol * |expected|`, with the expected value at the same place (`relative_to="each"`) or
    the largest finite one of its tensor ("largest": for gradients in low precision). The defaults follow the
    coarser dtype of the two: float64 1e-9 and 1e-12, float32 1e-5 and 1e-6, float16 2e-3 and 1e-5, bfloat16
    1.6e-2 and 1e-5. NaN equals NaN and an infinity equals itself.
    """
    tolerances = {"rtol": rtol, "atol": atol, "relative_to": relative_to}
    if actual is None or expected is None:
        if actual is not expected:
            raise AssertionError(f"{name}: expected {expected!r}, got {actual!r}")
        return
    if isinstance(expected, Mapping):
        if actual.keys() != expected.keys():
            raise AssertionError(f"{name}: expected the keys {sorted(expected)}, got {sorted(actual)}")
        for key in expected:
            assert_close(actual[key], expected[key], name=f"{name}[{key!r}]", **tolerances)
        return
    if isinstance(expected, tuple | list):
        if len(actual) != len(expected):
            raise AssertionError(f"{name}: expected {len(expected)} entries, got {len(actual)}")
        fields = getattr(expected, "_fields", [f"{name}[{i}]" for i in range(len(expected))])
        for field, one, other in zip(fields, actual, expected, strict=True):
            assert_close(one, other, name=field, **tolerances)
        return
    _assert_tensors_close(torch.as_tensor(actual), torch.as_tensor(expected), name, **tolerances)


def _assert_tensors_close(
    actual: Tensor, expected: Tensor, name: str, rtol: float | None, atol: float | None, relative_to: str
) -> None:
    if relative_to not in ("each", "largest"):
        raise ValueError(f"expected relative_to to be 'each' or 'largest', got {relative_to!r}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    floats = [tensor.dtype for tensor in (actual, expected) if tensor.is_floating_point()]
    default_rtol, default_atol = max((_TOLERANCES[dtype] for dtype in floats), default=(0.0, 0.0))
    rtol, atol = default_rtol if rtol is None else rtol, default_atol if atol is None else atol
    got, want = actual.detach().double(), expected.detach().double()
    size = want.abs()
    if relative_to == "largest":
        finite = size[size.isfinite()]
        size = finite.amax().expand_as(size) if finite.numel() else size
    allowed = atol + rtol * size
    distance = (got - want).abs()
    good = ((distance <= allowed) & want.isfinite()) | (got == want) | (got.isnan() & want.isnan())
    if good.all():
        return
    excess = torch.where(good, -1.0, (distance / allowed).nan_to_num(float("inf")))
    where = torch.unravel_index(excess.argmax(), excess.shape) if excess.ndim else ()
    place = [int(index) for index in where]
    a, b = got[where].item(), want[where].item()
    count = f"{int((~good).sum())} of {good.numel()} values differ, most at {place}: " if place else ""
    raise AssertionError(
        f"{name}: {count}got {a:.12g}, expected {b:.12g} "
        f"(difference {abs(a - b):.3g}, allowed {allowed[where].item():.3g})"
    )


Loss = Callable[[Tensor, Tensor], Tensor]


class _PropertyError(Exception):
    """A property does not hold; the message is the plain sentence."""


def _require(holds: bool | Tensor, sentence: str) -> None:
    if not holds:
        raise _PropertyError(sentence)


def _require_close(actual: Tensor, expected: Tensor, sentence: str, **tolerances: Any) -> None:
    try:
        assert_close(actual, expected, name=sentence, **tolerances)
    except AssertionError as error:
        raise _PropertyError(f"{error}.") from None


def _run(loss: Loss, scene: Scene, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    leaf = scene.leaf()
    value = loss(leaf, scene.target)
    _require(isinstance(value, Tensor) and value.ndim == 0, f"The loss is not a scalar tensor but {value!r:.200}.")
    _require(value.requires_grad, "The loss is not connected to its input (it has no grad_fn).")
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream), allow_unused=True)
    if grad is None:
        raise _PropertyError("The loss has a grad_fn, but no gradient reaches its input.")
    return value.detach(), grad


def _scalar(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    value = loss(scene.input, scene.target)
    _require(isinstance(value, Tensor) and value.ndim == 0, f"The loss is not a scalar tensor but {value!r:.200}.")
    _require(value.is_floating_point(), f"The loss has dtype {value.dtype}, not a float dtype.")
    _require(value.isfinite(), f"The loss of a finite input is {value.item()}.")


def _connected(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    _, grad = _run(loss, scene)
    _require(grad.isfinite().all(), "The gradient has NaN or Inf in it although the input is finite.")


def _slope(loss: Loss, scene: Scene, setup: _Setup) -> None:
    low, high = setup.as_input(torch.tensor(1.0)), setup.as_input(torch.tensor(6.0))
    hit = (scene.target != 0) & (scene.input >= low) & (scene.input <= high)
    if hit.any():
        _, grad = _run(loss, scene)
        _require(
            grad.count_nonzero() > 0,
            "The gradient is zero everywhere although the prediction hits the target and is not sure of it.",
        )


def _gradient(loss: Loss, scene: Scene, setup: _Setup) -> None:
    # Off the threshold and, for probabilities, off 0 and 1, so that every point of a difference is allowed.
    safe = scene.input.double().clamp(0.05, 0.95) if setup.probabilities else scene.input.double()
    step, edge = (2e-3, 0.5) if setup.probabilities else (1e-2, 0.0)
    safe = torch.where((safe - edge).abs() < 5 * step, edge + 6 * step, safe)
    scene = dataclasses.replace(scene, input=safe, target=scene.target.double())
    value, grad = _run(loss, scene)
    chance = torch.Generator().manual_seed(0)
    count = safe.numel()
    pixels = torch.randperm(count, generator=chance)[:6].tolist()
    directions = [torch.nn.functional.one_hot(torch.tensor(pixel), count).double() for pixel in pixels]
    directions += [torch.randn(count, generator=chance, dtype=torch.float64) for _ in range(2)]
    for number, flat in enumerate(directions):
        direction = (flat / flat.abs().amax()).view_as(safe)
        at = {k: loss(safe + k * step * direction, scene.target).double() for k in (-2, -1, 1, 2)}
        # Fourth order, with a step that a loss which computes in float32 inside survives.
        measured = ((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)).item()
        given_slope = (grad * direction).sum().item()
        allowed = 1e-4 * max(abs(measured), abs(given_slope)) + 5e-5 * max(1.0, abs(value.item()))
        where = "along a random direction"
        if number < len(pixels):
            where = f"at pixel {[int(i) for i in torch.unravel_index(flat.argmax(), safe.shape)]}"
        _require(
            abs(measured - given_slope) <= allowed,
            f"The gradient {where} is {given_slope:.8g}, but finite differences in float64 give "
            f"{measured:.8g}. (If that is meant, say straight_through=True.)",
        )


def _same(loss: Loss, scene: Scene, change: Callable[[Scene], Scene], what: str) -> None:
    """Value unchanged, and gradient changed like the scene."""
    value, grad = _run(loss, scene)
    other_value, other_grad = _run(loss, change(scene))
    _require_close(other_value, value, f"{what} changed the loss", rtol=1e-4)
    expected = change(dataclasses.replace(scene, input=grad)).input
    _require_close(other_grad, expected, f"{what} changed the gradient", rtol=1e-4, relative_to="largest")


def _batch_order(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    order = list(reversed(range(scene.input.shape[0])))
    _same(loss, scene, lambda scene: scene.reorder(order), "Reversing the order of the images")


def _flips(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    for axis in range(2, scene.input.ndim):
        _same(loss, scene, lambda scene, axis=axis: scene.flip((axis,)), f"Flipping axis {axis}")


def _layout(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    for name in LAYOUTS:
        _same(loss, scene, lambda scene, name=name: scene.layout(name), f"The memory layout {name!r}")


def _half(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        half = dataclasses.replace(scene, input=scene.input.to(dtype), target=scene.target.to(dtype))
        # The same rounded numbers in float32, so that only the arithmetic differs.
        full = dataclasses.replace(scene, input=half.input.float())
        (value, grad), (expected, expected_grad) = _run(loss, half), _run(loss, full)
        allowed: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "relative_to": "largest"}
        _require_close(value, expected, f"In {dtype} the loss is not that of float32", **allowed)
        _require(grad.dtype == dtype, f"The gradient of a {dtype} input is {grad.dtype}.")
        _require_close(grad, expected_grad, f"In {dtype} the gradient is not that of float32", **allowed)


def _upstream(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    _, grad = _run(loss, scene)
    _, scaled = _run(loss, scene, upstream=-2.5)
    _require_close(scaled, -2.5 * grad, "The gradient does not scale with the gradient from above", rtol=1e-4)


def _no_inplace(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    before = scene.input.clone(), scene.target.clone()
    _run(loss, scene)
    for name, old, new in zip(("input", "target"), before, (scene.input, scene.target), strict=True):
        _require(torch.equal(old, new), f"The loss wrote into its {name}.")


def _repeatable(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    first, second = _run(loss, scene), _run(loss, scene)
    for name, one, other in zip(("value", "gradient"), first, second, strict=True):
        _require(torch.equal(one, other), f"Two runs on the same scene differ in their {name}.")


def _nan(loss: Loss, scene: Scene, _setup: _Setup) -> None:
    for pixel in {0, scene.input.numel() // 2, scene.input.numel() - 1}:
        spoilt = scene.input.clone()
        spoilt.view(-1)[pixel] = float("nan")
        try:
            value = loss(spoilt, scene.target)
        except ValueError:  # refusing it is not silent
            continue
        where = [int(i) for i in torch.unravel_index(torch.tensor(pixel), spoilt.shape)]
        _require(not value.isfinite(), f"NaN at {where} of the input passed silently: the loss is {value.item()}.")


def _perfect(loss: Loss, scene: Scene, setup: _Setup) -> None:
    perfect = setup.as_input(torch.where(scene.target != 0, 40.0, -40.0)).to(scene.input.dtype)
    best, value = loss(perfect, scene.target).item(), loss(scene.input, scene.target).item()
    _require(
        best <= value + 1e-5 * max(1.0, abs(value)),
        f"A perfect prediction has the loss {best:.8g}, this one only {value:.8g}.",
    )


def _empty(loss: Loss, scene: Scene, setup: _Setup) -> None:
    nothing = torch.zeros_like(scene.target)
    quiet = setup.as_input(torch.full_like(scene.input, -40.0)).to(scene.input.dtype)
    for what, input in (("this prediction", scene.input), ("an empty prediction", quiet)):
        value, grad = _run(loss, Scene(input, nothing))
        _require(value.isfinite(), f"With an empty target and {what} the loss is {value.item()}.")
        _require(grad.isfinite().all(), f"With an empty target and {what} the gradient has NaN or Inf in it.")


@dataclass(frozen=True)
class _Setup:
    probabilities: bool

    def as_input(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.probabilities else logits


_CHECKS: dict[str, Callable[[Loss, Scene, _Setup], None]] = {
    "scalar": _scalar,
    "connected": _connected,
    "slope": _slope,
    "gradient": _gradient,
    "batch_order": _batch_order,
    "flips": _flips,
    "layout": _layout,
    "half": _half,
    "upstream": _upstream,
    "no_inplace": _no_inplace,
    "repeatable": _repeatable,
    "nan": _nan,
    "perfect": _perfect,
    "empty": _empty,
}

PROPERTIES = tuple(_CHECKS)
"""Names of the properties that `check_loss` tests, in this order."""


def check_loss(
    loss: Loss,
    *,
    probabilities: bool = False,
    straight_through: bool = False,
    skip: Collection[str] = (),
    channels: int = 1,
    dims: Sequence[int] = (2, 3),
    max_side: int = 5,
    examples: int = 30,
) -> None:
    """Check `loss(input, target) -> scalar` by its properties on scenes that Hypothesis draws and shrinks.

    `input` [B, C, *S] are float32 logits (probabilities in [0, 1] with `probabilities=True`), `target` is 0
    or 1 in the dtype of the input, C is `channels`, S has `dims` axes of at most `max_side`. Any callable
    will do: a function, a module, a lambda that fixes settings. `examples` scenes are tried per property.

        scalar       a finite float scalar
        connected    a gradient reaches the input, and it is finite
        slope        it is not zero everywhere where an unsure prediction hits the target
        gradient     it agrees with finite differences in float64 (not asked of a `straight_through` loss,
                     whose gradient is defined otherwise)
        batch_order  reversing the batch changes nothing
        flips        flipping an axis changes nothing
        layout       channels_last and non-contiguous tensors change nothing
        half         float16 and bfloat16 give the float32 value and gradient, within 1 % and 5 %
        upstream     the gradient scales with the gradient from above
        no_inplace   input and target are left alone
        repeatable   two runs are bitwise the same
        nan          NaN in the input makes the loss NaN or Inf, or raises ValueError
        perfect      no prediction is better than the target itself
        empty        with an empty target, value and gradient are finite

    `skip` switches properties off by name. Raises AssertionError with one sentence and the smallest scene
    found for the first property that does not hold; ValueError for a name that is not in `PROPERTIES`.
    """
    unknown = sorted(set(skip) - set(PROPERTIES))
    if unknown:
        raise ValueError(f"expected skip to hold names from {PROPERTIES}, got {unknown}")
    setup = _Setup(probabilities)
    drawn = scenes(
        dims=dims,
        max_side=max_side,
        max_batch=3,
        channels=(channels, channels),
        dtypes=(torch.float32,),
        target_dtypes=(torch.float32,),
        layouts=("contiguous",),
        probabilities=probabilities,
    )
    for name, check in _CHECKS.items():
        if name not in skip and not (name == "gradient" and straight_through):
            _search(name, check, loss, setup, drawn, examples)


def _search(
    name: str,
    check: Callable[[Loss, Scene, _Setup], None],
    loss: Loss,
    setup: _Setup,
    drawn: st.SearchStrategy[Scene],
    examples: int,
) -> None:
    found: list[str] = []

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        verbosity=Verbosity.quiet,
    )
    @given(drawn)
    def search(scene: Scene) -> None:
        try:
            check(loss, scene, setup)
        except Exception as error:
            sentence = str(error) if isinstance(error, _PropertyError) else f"It raised {type(error).__name__}: {error}"
            found.append(f"{sentence}\n{scene}")
            raise

    try:
        search()
    except Exception as error:
        if not found:
            raise
        # Hypothesis runs the smallest failing scene last; a loss that fails only now and then raises Flaky.
        sometimes = " (not on every run)" if isinstance(error, Flaky) else ""
        cause = None if isinstance(error, _PropertyError | Flaky) else error
        raise AssertionError(f"the loss lacks the property {name!r}{sometimes}. {found[-1]}") from cause
