"""A run as one TOML file: every key checked before any work.

The tables are `[data]`, `[validation]`, `[network]`, `[loss]`, `[training]` and `[augmentation]`; a dataclass here for
each, whose fields are the keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fastinstance
from fastinstance import BlobLoss, GeneralizedDiceFocalLoss, InstanceLoss
from fastinstance.study.subjects import StudyError

__all__ = [
    "SCORES",
    "AugmentationConfig",
    "Evaluation",
    "LossConfig",
    "RunConfig",
    "SumOfLosses",
    "SwinUNETRConfig",
    "TrainingConfig",
    "UNetConfig",
    "build_loss",
    "build_pixel_loss",
    "named_terms",
    "read_config",
    "read_table",
    "read_toml",
    "refuse_unknown",
    "to_toml",
]

SCORES = {"dice": "dsc", "sensitivity": "sen", "precision": "ppv", "f1": "f1", "panoptic_quality": "pq"}
"""Names of the validation's metrics, and what `fastinstance.metrics` calls them."""
LOSSES = tuple(name for name in fastinstance.__all__ if name.endswith("Loss"))
OF_THE_TRAINING = {  # what the training itself knows
    "sigmoid",
    "softmax",
    "other_act",
    "to_onehot_y",
    "include_background",
    "reduction",
    "process_group",
}

Check = Callable[[Any], Any]
T = TypeVar("T")


class _ExpectedError(Exception):
    """What a value should have been."""


def _key(default: Any, check: Check) -> Any:
    """A field of a table: its default, and what turns a value of the file into that of the field."""
    metadata = {"check": check}
    if isinstance(default, Mapping | list):
        return field(default_factory=lambda: default.copy(), metadata=metadata)  # pyright: ignore[reportAttributeAccessIssue]
    return field(default=default, metadata=metadata)


def _whole(least: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise _ExpectedError(f"a whole number from {least} on")
        return value

    return check


def _wholes(shortest: int) -> Check:
    def check(value: Any) -> tuple[int, ...]:
        whole = _whole(1)
        try:
            if isinstance(value, list | tuple) and len(value) >= shortest:
                return tuple(whole(one) for one in value)
        except _ExpectedError:
            pass
        raise _ExpectedError(f"a list of {shortest} or more whole numbers from 1 on")

    return check


def _number(what: str, least: float, most: float = math.inf, *, open_start: bool = False) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _ExpectedError(what)
        if not least <= value <= most or (open_start and value == least):
            raise _ExpectedError(what)
        return float(value)

    return check


def _one_of(*names: str) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise _ExpectedError(", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"')
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _ExpectedError("true or false")
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _ExpectedError("a table")
    return dict(value)


def _device(value: Any) -> str:
    try:
        if value != "auto":
            torch.device(value)
    except (RuntimeError, TypeError):
        raise _ExpectedError('"auto", "cpu", "cuda" or "cuda:0"') from None
    return value


_share = _number("a share from 0 to 1", 0, 1)
_part = _number("a share above 0 and below 1", 0, math.nextafter(1, 0), open_start=True)
_not_negative = _number("a number from 0 on", 0)


@dataclass(frozen=True)
class UNetConfig:
    """MONAI's 2D U-Net."""

    name: str = _key("unet", _one_of("unet"))
    channels: tuple[int, ...] = _key((16, 32, 64), _wholes(2))
    """Of each level; each is half as wide and high as the one before."""
    residual_units: int = _key(0, _whole(0))
    dropout: float = _key(0.0, _share)


@dataclass(frozen=True)
class SwinUNETRConfig:
    """MONAI's SwinUNETR in 2D, the paper's network."""

    name: str = _key("swinunetr", _one_of("swinunetr"))
    feature_size: int = _key(24, _whole(1))
    depths: tuple[int, ...] = _key((2, 2, 2, 2), _wholes(4))
    heads: tuple[int, ...] = _key((3, 6, 12, 24), _wholes(4))
    dropout: float = _key(0.0, _share)
    checkpointing: bool = _key(False, _flag)
    """Compute activations again in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        widths = [self.feature_size * 2**level for level in range(4)]
        if self.feature_size % 12 or len(self.depths) != 4 or len(self.heads) != 4:
            raise StudyError(
                "[network] of swinunetr: expected a feature_size that 12 divides, four depths and four heads, got "
                f"feature_size = {self.feature_size}, depths = {list(self.depths)}, heads = {list(self.heads)}"
            )
        if any(width % heads for width, heads in zip(widths, self.heads, strict=True)):
            raise StudyError(
                f"[network] heads: expected divisors of {widths}, the channels of the levels, got {list(self.heads)}"
            )


NETWORKS = {"unet": UNetConfig, "swinunetr": SwinUNETRConfig}


@dataclass(frozen=True)
class PartConfig:
    """One more loss, added to that of `[loss]`."""

    name: str = _key("DiceCELoss", _one_of(*LOSSES))
    weight: float = _key(1.0, _not_negative)
    options: Mapping[str, Any] = _key({}, _table)


def _parts(value: Any) -> tuple[PartConfig, ...]:
    if not isinstance(value, list | tuple):
        raise _ExpectedError('a list of tables such as { name = "CCLoss", weight = 0.5, options = {} }')
    return tuple(one if isinstance(one, PartConfig) else read_table(PartConfig, one, "[loss] plus") for one in value)


@dataclass(frozen=True)
class LossConfig:
    """A loss of this library by name, with its arguments."""

    name: str = _key("FalseLoss", _one_of(*LOSSES))
    weight: float = _key(1.0, _not_negative)
    options: Mapping[str, Any] = _key({}, _table)
    plus: tuple[PartConfig, ...] = _key((), _parts)
    """Further losses; the sum of all is trained."""
    warm_up: float = _key(0.0, _share)
    """Share of the steps that are trained with the pixel loss GeneralizedDiceFocalLoss alone first."""

    def __post_init__(self) -> None:
        build_loss(self)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, with which batches, and how."""

    epochs: int = _key(200, _whole(1))
    steps_per_epoch: int | None = _key(None, _whole(1))
    """Every training subject once, if not given."""
    subjects_per_batch: int = _key(2, _whole(1))
    slices_per_subject: int = _key(24, _whole(1))
    """At random; no more than the subject with most slices has."""
    with_lesions: bool = _key(False, _flag)
    """Draw only slices that have an instance."""
    optimizer: str = _key("adam", _one_of("adam", "adamw"))
    learning_rate: float = _key(1e-3, _number("a number above 0", 0, open_start=True))
    weight_decay: float = _key(0.0, _not_negative)
    schedule: str = _key("constant", _one_of("constant", "cosine"))
    """Of the learning rate; "cosine" falls to 0."""
    rate_warm_up: float = _key(0.0, _share)
    """Share of the steps in which the learning rate rises to its value."""
    seed: int = _key(0, _whole(0))
    device: str = _key("auto", _device)
    precision: str = _key("float32", _one_of("float32", "bf16", "fp16"))
    compile: bool = _key(False, _flag)
    graph: bool = _key(False, _flag)
    """Forward and backward pass as one CUDA graph."""
    threads: int | None = _key(None, _whole(1))
    """Of the CPU; the last digits depend on it."""
    validate_every: int = _key(1, _whole(1))
    """Epochs; the last one is always validated."""
    metric: str = _key("f1", _one_of(*SCORES))
    """Whose best epoch is kept."""
    min_size: int = _key(0, _whole(0))
    """Pixels; smaller instances are background in validation."""
    tensorboard: bool = _key(False, _flag)


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of each slice; none by default."""

    rotation: float = _key(0.0, _number("degrees from 0 to 180", 0, 180))
    """Uniform between minus and plus this."""
    flip: str = _key("none", _one_of("none", "horizontal", "vertical", "both"))
    scale: float = _key(0.0, _not_negative)
    """Standard deviation of the factor of all intensities, around 1."""
    shift: float = _key(0.0, _not_negative)
    """Standard deviation of what is added to all intensities."""


@dataclass(frozen=True)
class Evaluation:
    """How a study judges predictions; a table of its plan."""

    min_size: int = _key(0, _whole(0))
    small_ml: float = _key(0.05, _number("a number above 0", 0, open_start=True))
    tune: str = _key("pq", _one_of("pq", "f1", "dsc"))
    collapse: float = _key(0.05, _part)


@dataclass(frozen=True)
class RunConfig:
    """What a run file says."""

    data: Mapping[str, Any] = field(default_factory=dict)
    """As `fastinstance.study.data.load` takes it; empty where the subjects come from elsewhere."""
    validation: float | Mapping[str, Any] = 0.2
    """Share of the persons of `data`, or data of its own."""
    network: UNetConfig | SwinUNETRConfig = UNetConfig()
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = TrainingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> RunConfig:
        """A run from the tables of its file.

        Raises:
            StudyError: an unknown key or loss, or a value that cannot be; names the key.
        """
        refuse_unknown(table, [one.name for one in dataclasses.fields(cls)], "of a run", what="table")
        tables = {name: _as_table(value, name) for name, value in table.items()}
        data = tables.get("data", {})
        if "validation" in data and "validation" in tables:
            raise StudyError("expected validation in [data], as a share, or as a table [validation], got both")
        validation = tables.get("validation", data.pop("validation", cls.validation))
        if not isinstance(validation, Mapping):
            validation = _checked(_part, validation, "[data] validation")
        network = tables.get("network", {})
        kind = _checked(_one_of(*NETWORKS), network.get("name", "unet"), "[network] name")
        return cls(
            data=data,
            validation=validation,
            network=read_table(NETWORKS[kind], network, "[network]"),
            loss=read_table(LossConfig, tables.get("loss", {}), "[loss]"),
            training=read_table(TrainingConfig, tables.get("training", {}), "[training]"),
            augmentation=read_table(AugmentationConfig, tables.get("augmentation", {}), "[augmentation]"),
        )

    def to_table(self) -> dict[str, Any]:
        """All settings, defaults too, as `from_table` reads them."""
        table = _plain(self)
        validation = table.pop("validation")
        if isinstance(validation, dict):
            table["validation"] = validation
        else:
            table["data"]["validation"] = validation
        return table

    def to_toml(self) -> str:
        """All settings, defaults too, as a run file."""
        return to_toml(self.to_table())


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        StudyError: no such file, not TOML, or a number that is infinite or NaN.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: expected TOML: {error}") from error
    for key, value in _numbers(table):
        if not math.isfinite(value):
            raise StudyError(f"{path}: {key}: expected a finite number, got {value}")
    return table


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a table, and where it is, such as "losses.GDF.options.gamma"."""
    if isinstance(value, float):
        yield key, value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value, 1) if isinstance(value, list) else ()
    for name, one in inner:
        yield from _numbers(one, f"{key}.{name}" if key else str(name))


def read_config(path: Path) -> RunConfig:
    """The run of a TOML file.

    Raises:
        StudyError: as `read_toml` and `RunConfig.from_table`.
    """
    table = read_toml(path)
    try:
        return RunConfig.from_table(table)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from error


def refuse_unknown(found: Iterable[str], known: Sequence[str], where: str, *, what: str = "key") -> None:
    """Names of a table that are not known, with the nearest that is.

    Raises:
        StudyError: there is one.
    """
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise StudyError(f"unknown {what} {name} {where}: {hint}")


def _as_table(value: Any, name: str) -> dict[str, Any]:
    return _checked(_table, value, f"[{name}]")


def _checked(check: Check, value: Any, where: str) -> Any:
    try:
        return check(value)
    except _ExpectedError as error:
        got = ""
        if isinstance(value, str):
            near = difflib.get_close_matches(value, str(error).replace('"', "").replace(",", "").split(), 1, 0.5)
            got = f"; did you mean {near[0]}?" if near else ""
        raise StudyError(f"{where}: expected {error}, got {value!r}{got}") from None


def read_table(kind: type[T], table: Any, where: str) -> T:
    """A dataclass of this module from its table; `where` names the table in errors.

    Raises:
        StudyError: an unknown key, or a value that cannot be.
    """
    table = _checked(_table, table, where)
    checks = {one.name: one.metadata["check"] for one in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    refuse_unknown(table, list(checks), f"in {where}")
    return kind(**{name: _checked(checks[name], value, f"{where} {name}") for name, value in table.items()})


def _plain(value: Any) -> Any:
    """Dataclasses as tables, tuples as lists, without what is None."""
    if dataclasses.is_dataclass(value):
        return _plain({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def to_toml(table: Mapping[str, Any]) -> str:
    """Tables of plain values as TOML; tables below the first level are written inline."""
    sections = [
        "\n".join([f"[{_toml_name(name)}]", *(f"{_toml_name(key)} = {_toml(value)}" for key, value in keys.items())])
        for name, keys in table.items()
    ]
    return "\n\n".join(sections) + "\n"


def _toml_name(name: str) -> str:
    bare = name and all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in name)
    return name if bare else json.dumps(name, ensure_ascii=False)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            f"{{ {', '.join(f'{_toml_name(key)} = {_toml(one)}' for key, one in value.items())} }}" if value else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value) if isinstance(value, int | float) else str(value)  # dates print as TOML has them


class SumOfLosses(nn.Module):
    """Σ weight · loss."""

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.losses, self.weights = nn.ModuleList(losses), tuple(weights)

    def forward(self, input: Tensor, target: Tensor, **images: Tensor | None) -> Tensor:
        values = [w * loss(input, target, **images) for w, loss in zip(self.weights, self.losses, strict=True)]
        return torch.stack(values).sum()


def named_terms(loss: nn.Module, input: Tensor, target: Tensor, **images: Tensor | None) -> dict[str, Tensor]:
    """What a loss adds up, by name; a loss without terms is its own only one."""
    if isinstance(loss, SumOfLosses):
        return {
            f"{type(one).__name__} {name}": weight * value
            for weight, one in zip(loss.weights, loss.losses, strict=True)
            for name, value in named_terms(one, input, target, **images).items()
        }
    if isinstance(loss, InstanceLoss | BlobLoss):
        weights, terms = loss.weights._asdict(), loss.terms(input, target, **images)._asdict()
        return {name: weights[name] * value for name, value in terms.items() if weights[name]}
    return {type(loss).__name__: loss(input, target, **images)}


def build_loss(config: LossConfig, *, process_group: str | None = None) -> nn.Module:
    """The loss of logits that a run trains, after its warm-up.

    Args:
        config: of `[loss]`.
        process_group: "world" for averages over the instances of all ranks, in the losses that have them.

    Raises:
        StudyError: the loss does not take an option, or not this value.
    """
    first = _build(config.name, config.options, process_group, "[loss] options")
    if not config.plus and config.weight == 1:
        return first
    others = [_build(part.name, part.options, process_group, "[loss] plus, options") for part in config.plus]
    return SumOfLosses([first, *others], [config.weight, *(part.weight for part in config.plus)])


def build_pixel_loss() -> nn.Module:
    """The loss of logits of the warm-up."""
    return GeneralizedDiceFocalLoss(sigmoid=True)


def _build(name: str, options: Mapping[str, Any], process_group: str | None, where: str) -> nn.Module:
    kind = getattr(fastinstance, name)
    for reserved in OF_THE_TRAINING.intersection(options):
        raise StudyError(f"{where}: {reserved} is set by the training; leave it out")
    hints = typing.get_type_hints(kind.__init__)
    (further,) = typing.get_args(hints.pop("options"))  # **options: Unpack[a TypedDict]
    arguments = [*hints, *further.__annotations__]
    known = [one for one in arguments if one not in (*OF_THE_TRAINING, "return")]
    refuse_unknown(options, known, f"in {where} of {name}", what="option")
    average = {"process_group": process_group} if "process_group" in arguments else {}
    try:
        loss = kind(sigmoid=True, **average, **options)
        loss.settings.for_axes(2)
        return loss
    except (TypeError, ValueError) as error:
        raise StudyError(f"{where} of {name}: {error}") from error
