"""`check_loss`: what any loss should do, tried on drawn scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor

from .comparison import assert_close
from .strategies import LAYOUTS, Scene, scenes

__all__ = ["PROPERTIES", "check_loss"]

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
