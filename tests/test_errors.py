"""Bad input: a ValueError or TypeError that names the argument, what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastinstance
from fastinstance import compat, functional
from fastinstance.testing import pattern

NAN, INF = float("nan"), float("inf")
LOGITS = torch.linspace(-3, 3, 2 * 2 * 4 * 5).view(2, 2, 4, 5)
TARGET = pattern("checkerboard", (4, 5)).float().expand(2, 2, 4, 5)
LABELS = TARGET.long() * 7
INDICES = TARGET[:, :1]


def with_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[1, 0, 2, 2] = value
    return changed


# What is wrong -> the arguments that differ from a good call, the exception, and what its message must say.
Row = tuple[dict[str, Any], type[Exception], list[str]]
TENSORS: dict[str, Row] = {
    "input is a list": ({"input": [[1.0]]}, TypeError, ["input", "tensor", "list"]),
    "input of integers": ({"input": LOGITS.long()}, TypeError, ["input", "float", "torch.int64", "input.float()"]),
    "input of bools": ({"input": LOGITS > 0}, TypeError, ["input", "float", "torch.bool"]),
    "input is complex": ({"input": LOGITS.to(torch.complex64)}, TypeError, ["input", "float", "complex64"]),
    "input without channels": ({"input": LOGITS[:, 0]}, ValueError, ["input [B,C,H,W]", "(2, 4, 5)", "add"]),
    "input of one axis": ({"input": LOGITS[0, 0, 0]}, ValueError, ["input [B,C,H,W]", "(5,)", "add"]),
    "input with an axis too many": (
        {"input": LOGITS[..., None, None]},
        ValueError,
        ["input [B,C,H,W] or [B,C,D,H,W]", "(2, 2, 4, 5, 1, 1)"],
    ),
    "input of an empty batch": ({"input": LOGITS[:0], "target": TARGET[:0]}, ValueError, ["input", "(0, 2, 4, 5)"]),
    "input without pixels": (
        {"input": LOGITS[..., :0], "target": TARGET[..., :0]},
        ValueError,
        ["input", "(2, 2, 4, 0)"],
    ),
    "target is a number": ({"target": 1}, TypeError, ["target", "tensor", "int"]),
    "target is None": ({"target": None}, TypeError, ["target", "tensor", "None"]),
    "target without channels": (
        {"target": TARGET[:, 0]},
        ValueError,
        ["target [B,1,*S] or [B,C,*S]", "(2, 2, 4, 5)", "(2, 4, 5)", "add a channel axis with target[:, None]"],
    ),
    "target of another size": ({"target": TARGET[..., 1:]}, ValueError, ["target", "(2, 2, 4, 5)", "(2, 2, 4, 4)"]),
    "target of another batch": ({"target": TARGET[:1]}, ValueError, ["target", "(2, 2, 4, 5)", "(1, 2, 4, 5)"]),
    "target of more channels": (
        {"target": TARGET[:, [0, 1, 1]]},
        ValueError,
        ["target", "(2, 2, 4, 5)", "(2, 3, 4, 5)"],
    ),
    "target is complex": ({"target": TARGET.to(torch.complex64)}, TypeError, ["target", "real", "complex64"]),
    "target elsewhere": ({"target": TARGET.to("meta")}, ValueError, ["target", "device", "cpu", "meta"]),
    "target of probabilities": ({"target": with_value(TARGET, 0.5)}, ValueError, ["target", "0 and 1", "target > 0"]),
    "target of 255": ({"target": TARGET * 255}, ValueError, ["target", "0 and 1", "target > 0"]),
    "target of ids": ({"target": LABELS}, ValueError, ["target", "0 and 1", "target_labels="]),
    "target negative": ({"target": with_value(TARGET, -1)}, ValueError, ["target", "0 and 1"]),
    "target NaN": ({"target": with_value(TARGET, NAN)}, ValueError, ["target", "0 and 1"]),
    "class indices for a binary target": (
        {"target": with_value(INDICES, 2)},
        ValueError,
        ["target", "to_onehot_y=True"],
    ),
    "class indices without to_onehot_y": (
        {"softmax": True, "sigmoid": False, "target": INDICES.bool()},
        ValueError,
        ["target [B,C,*S]", "softmax=True", "(2, 1, 4, 5)", "to_onehot_y=True"],
    ),
    "one-hot target with to_onehot_y": (
        {"to_onehot_y": True},
        ValueError,
        ["target [B,1,*S]", "class indices", "(2, 2, 4, 5)", "to_onehot_y=False"],
    ),
    "class index too large": (
        {"to_onehot_y": True, "target": with_value(INDICES, 2)},
        ValueError,
        ["target", "class indices 0 to 1", "to_onehot_y=True", "2"],
    ),
    "class index negative": (
        {"to_onehot_y": True, "target": with_value(INDICES, -1)},
        ValueError,
        ["target", "class indices 0 to 1", "-1"],
    ),
    "class index between two": (
        {"to_onehot_y": True, "target": with_value(INDICES, 0.5)},
        ValueError,
        ["target", "class indices"],
    ),
    "class index NaN": (
        {"to_onehot_y": True, "target": with_value(INDICES, NAN)},
        ValueError,
        ["target", "class indices", "nan"],
    ),
    "labels are a list": ({"target_labels": [1]}, TypeError, ["target_labels", "tensor", "list"]),
    "labels of floats": ({"target_labels": LABELS.float()}, TypeError, ["target_labels", "integer", "torch.float32"]),
    "labels of bools": ({"target_labels": LABELS > 0}, TypeError, ["target_labels", "integer", "torch.bool"]),
    "labels of one channel": (
        {"target_labels": LABELS[:, :1]},
        ValueError,
        ["target_labels [B,C,*S]", "(2, 2, 4, 5)", "(2, 1, 4, 5)"],
    ),
    "labels elsewhere": ({"target_labels": LABELS.to("meta")}, ValueError, ["target_labels", "device", "meta"]),
    "labels negative": (
        {"target_labels": with_value(LABELS, -3)},
        ValueError,
        ["target_labels", "0", "2147483647", "-3"],
    ),
    "labels huge": (
        {"target_labels": torch.where(LABELS > 0, 2**31, 0)},
        ValueError,
        ["target_labels", "2147483647", "2147483648"],
    ),
    "labels that miss the target": (
        {"target_labels": with_value(LABELS, 0)},
        ValueError,
        ["target_labels", "target", "1 pixel", "target = target_labels > 0"],
    ),
    "labels where the target is not": (
        {"target_labels": LABELS + 1},
        ValueError,
        ["target_labels", "target", "40 pixels", "target = target_labels > 0"],
    ),
    "mask is a list": ({"valid_mask": [1]}, TypeError, ["valid_mask", "tensor", "list"]),
    "mask of all channels": (
        {"valid_mask": TARGET},
        ValueError,
        ["valid_mask [B,1,*S]", "(2, 1, 4, 5)", "(2, 2, 4, 5)"],
    ),
    "mask of another size": ({"valid_mask": INDICES[..., 1:]}, ValueError, ["valid_mask", "(2, 1, 4, 4)"]),
    "mask elsewhere": ({"valid_mask": INDICES.to("meta")}, ValueError, ["valid_mask", "device", "meta"]),
    "mask not binary": ({"valid_mask": with_value(INDICES, 0.5)}, ValueError, ["valid_mask", "0 and 1", "> 0"]),
    "mask NaN": ({"valid_mask": with_value(INDICES, NAN)}, ValueError, ["valid_mask", "0 and 1"]),
    "softmax of one channel": (
        {"sigmoid": False, "softmax": True, "input": LOGITS[:, :1], "target": INDICES},
        ValueError,
        ["softmax", "two channels", "(2, 1, 4, 5)"],
    ),
    "one-hot of one channel": (
        {"to_onehot_y": True, "input": LOGITS[:, :1], "target": INDICES},
        ValueError,
        ["to_onehot_y", "two channels", "(2, 1, 4, 5)"],
    ),
    "nothing but background": (
        {"include_background": False, "input": LOGITS[:, :1], "target": INDICES},
        ValueError,
        ["include_background", "two channels", "(2, 1, 4, 5)"],
    ),
    "logits for probabilities": (
        {"sigmoid": False},
        ValueError,
        ["input", "probabilities in [0, 1]", "-3", "3", "sigmoid=True or softmax=True"],
    ),
    "probability above 1": (
        {"sigmoid": False, "input": with_value(LOGITS.sigmoid(), 1.25)},
        ValueError,
        ["input", "probabilities in [0, 1]", "1.25"],
    ),
    "probability NaN": (
        {"sigmoid": False, "input": with_value(LOGITS.sigmoid(), NAN)},
        ValueError,
        ["input", "probabilities in [0, 1]", "nan"],
    ),
    "probability infinite": (
        {"sigmoid": False, "input": with_value(LOGITS.sigmoid(), INF)},
        ValueError,
        ["input", "probabilities in [0, 1]", "inf"],
    ),
    "activation that leaves [0, 1]": (
        {"sigmoid": False, "other_act": torch.tanh},
        ValueError,
        ["probabilities in [0, 1]", "-0.99"],
    ),
    "activation that changes the shape": (
        {"sigmoid": False, "other_act": lambda x: x.sigmoid()[:, :1]},
        ValueError,
        ["other_act", "(2, 2, 4, 5)", "(2, 1, 4, 5)"],
    ),
    "activation that gives no tensor": (
        {"sigmoid": False, "other_act": lambda x: 0.5},
        TypeError,
        ["other_act", "tensor", "float"],
    ),
}

SETTINGS: dict[str, Row] = {
    "unknown pixel loss": ({"pixel_loss": "dicee"}, ValueError, ["pixel_loss", "'dicee'", "dice, ", "gdf"]),
    "unknown instance loss": ({"instance_loss": "bce"}, ValueError, ["instance_loss", "'bce'", "dice, ", "gdf"]),
    "unknown centre loss": ({"center_loss": ""}, ValueError, ["center_loss", "''", "dice, ", "gdf"]),
    "pixel loss is a number": ({"pixel_loss": 3}, TypeError, ["pixel_loss", "3", "dice", "(P, G) -> scalar"]),
    "pixel loss of instances": ({"pixel_loss": fastinstance.ICILoss()}, TypeError, ["pixel_loss", "ICILoss"]),
    "pixel loss is a class": ({"pixel_loss": fastinstance.DiceLoss}, TypeError, ["pixel_loss", "DiceLoss"]),
    "centre loss is None": ({"center_loss": None}, TypeError, ["center_loss", "None"]),
    "pixel loss with another activation": (
        {"pixel_loss": fastinstance.DiceLoss(softmax=True)},
        ValueError,
        ["pixel_loss", "softmax=True", "outer loss"],
    ),
    "unknown average": ({"average": "batch"}, ValueError, ["average", "'batch'", "'instance'", "'image'"]),
    "unknown reduction": ({"reduction": "avg"}, ValueError, ["reduction", "'avg'", "'mean'", "'sum'", "'none'"]),
    "unknown normalizer": ({"pred_normalizer": "both"}, ValueError, ["pred_normalizer", "'both'", "'pred'", "'gt'"]),
    "two activations": ({"softmax": True}, ValueError, ["sigmoid=True", "softmax=True", "at most one"]),
    "activation twice": ({"other_act": torch.tanh}, ValueError, ["sigmoid=True", "other_act", "at most one"]),
    "activation by name": ({"sigmoid": False, "other_act": "tanh"}, TypeError, ["other_act", "callable", "str"]),
    "threshold 0": ({"threshold": 0}, ValueError, ["threshold", "between 0 and 1", "0"]),
    "threshold 1": ({"threshold": 1.0}, ValueError, ["threshold", "between 0 and 1", "1.0"]),
    "threshold NaN": ({"threshold": NAN}, ValueError, ["threshold", "between 0 and 1", "nan"]),
    "threshold by name": ({"threshold": "otsu"}, (ValueError, TypeError), ["threshold", "between 0 and 1", "otsu"]),
    "connectivity of 3D": ({"connectivity": 26}, ValueError, ["connectivity", "(4, 8)", "2D", "26"]),
    "connectivity by scipy's count": ({"connectivity": 1}, ValueError, ["connectivity", "(4, 8)", "1"]),
    "connectivity of no image": ({"connectivity": 5}, ValueError, ["connectivity", "(4, 8)", "(6, 18, 26)", "5"]),
    "connectivity as a tensor": ({"connectivity": torch.tensor(8)}, ValueError, ["connectivity", "tensor(8)"]),
    "centre of no size": ({"center_size": 0}, ValueError, ["center_size", "positive integer", "0"]),
    "centre of half a pixel": ({"center_size": 2.5}, ValueError, ["center_size", "positive integer", "2.5"]),
    "centre of three axes": ({"center_size": (3, 3, 3)}, ValueError, ["center_size", "2 of them", "(3, 3, 3)"]),
    "centre by name": ({"center_size": "3"}, ValueError, ["center_size", "positive integer", "'3'"]),
    "negative min_size": ({"min_size": -1}, ValueError, ["min_size", "integer >= 0", "-1"]),
    "min_size of half a pixel": ({"min_size": 1.5}, ValueError, ["min_size", "integer >= 0", "1.5"]),
    "spacing 0": ({"spacing": (1.0, 0.0)}, ValueError, ["spacing", "positive", "(1.0, 0.0)"]),
    "spacing negative": ({"spacing": (1.0, -1.0)}, ValueError, ["spacing", "positive", "-1.0"]),
    "spacing NaN": ({"spacing": (1.0, NAN)}, ValueError, ["spacing", "positive", "nan"]),
    "spacing infinite": ({"spacing": INF}, ValueError, ["spacing", "positive", "inf"]),
    "spacing of three axes": ({"spacing": (1, 1, 1)}, ValueError, ["spacing", "2 of them", "(1, 1, 1)"]),
    "spacing by name": ({"spacing": "iso"}, ValueError, ["spacing", "positive", "'iso'"]),
    "spacing of names": ({"spacing": ("1", "2")}, ValueError, ["spacing", "positive", "('1', '2')"]),
}
ROWS = {**TENSORS, **SETTINGS}
BLOB_HAS_NO = {"average", "center_loss", "center_size", "spacing", "pred_normalizer", "threshold"}


def call(function: Callable[..., Any], changes: dict[str, Any]) -> Any:
    arguments = {"input": LOGITS, "target": TARGET, "sigmoid": True, **changes}
    return function(arguments.pop("input"), arguments.pop("target"), **arguments)


def check_message(error: Exception, words: list[str]) -> None:
    message = str(error)
    missing = [word for word in [*words, "expected", "got"] if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message


def test_the_good_call_is_good() -> None:
    labels = {"target_labels": LABELS, "valid_mask": torch.ones_like(INDICES)}
    assert call(functional.instance_terms, labels).seg.isfinite()
    assert call(functional.instance_terms, {"to_onehot_y": True, "target": INDICES}).seg.isfinite()


@pytest.mark.parametrize("wrong", ROWS)
def test_instance_terms(wrong: str) -> None:
    changes, exception, words = ROWS[wrong]
    with pytest.raises(exception) as caught:
        call(functional.instance_terms, changes)
    check_message(caught.value, words)


@pytest.mark.parametrize("wrong", [name for name, (changes, *_) in ROWS.items() if not BLOB_HAS_NO & changes.keys()])
def test_blob_terms(wrong: str) -> None:
    changes, exception, words = ROWS[wrong]
    with pytest.raises(exception) as caught:
        call(functional.blob_terms, changes)
    check_message(caught.value, words)


@pytest.mark.parametrize("wrong", TENSORS)
def test_modules_at_the_call(wrong: str) -> None:
    changes, exception, words = TENSORS[wrong]
    options = {"sigmoid": True, **changes}
    tensors = {name: options.pop(name, None) for name in ("target_labels", "valid_mask")}
    images = options.pop("input", LOGITS), options.pop("target", TARGET)
    for loss in (fastinstance.ProximityLoss(**options), fastinstance.DiceLoss(**options)):
        with pytest.raises(exception) as caught:
            loss(*images, **tensors)
        check_message(caught.value, words)


FIT_3D = {"connectivity of 3D", "centre of three axes", "spacing of three axes"}


@pytest.mark.parametrize("wrong", sorted(SETTINGS.keys() - FIT_3D))
def test_modules_at_the_start(wrong: str) -> None:
    """A setting is refused when the module is made, not in the first step of a training."""
    changes, exception, words = SETTINGS[wrong]
    with pytest.raises(exception) as caught:
        fastinstance.FalseLoss(**{"sigmoid": True, **changes})
    check_message(caught.value, words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fastinstance.InstanceLoss(seg=NAN), ["seg", "finite", "nan"]),
        (lambda: fastinstance.ICILoss(center=INF), ["center", "finite", "inf"]),
        (lambda: fastinstance.InstanceLoss(proximity="much"), ["proximity", "finite", "'much'"]),
        (lambda: fastinstance.BlobLoss(blob_weight=NAN), ["blob_weight", "finite", "nan"]),
        (lambda: fastinstance.InstanceLoss(seg=0), ["at least one weight"]),
        (lambda: fastinstance.BlobLoss(pixel_weight=0, blob_weight=0), ["at least one weight"]),
        (lambda: fastinstance.FocalLoss(gamma=-1), ["gamma", "-1"]),
        (lambda: fastinstance.FocalLoss(gamma=NAN), ["gamma", "nan"]),
        (lambda: fastinstance.FocalLoss(gamma="2"), ["gamma", "'2'"]),
        (lambda: fastinstance.DiceLoss(smooth_nr=-1), ["smooth_nr", "-1"]),
        (lambda: fastinstance.DiceLoss(smooth_nr=None), ["smooth_nr", "None"]),
        (lambda: fastinstance.LesionRecallLoss(recall="1"), ["recall", "'1'"]),
        (lambda: fastinstance.ICILoss(spacing=(1, 0, 1)), ["spacing", "3 of them", "(1, 0, 1)"]),
        (lambda: fastinstance.ICILoss(spacing=(1,)), ["spacing", "2 of them", "(1,)"]),
        (lambda: fastinstance.ICILoss(connectivity=8, spacing=(1, 1, 1)), ["connectivity", "3D", "8"]),
        (lambda: fastinstance.TverskyLoss(alpha=-0.5), ["alpha", "-0.5"]),
        (lambda: fastinstance.TverskyLoss(beta=INF), ["beta", "inf"]),
        (lambda: fastinstance.DiceCELoss(lambda_ce=NAN), ["lambda_ce", "nan"]),
        (lambda: fastinstance.GeneralizedDiceFocalLoss(lambda_focal=INF), ["lambda_focal", "inf"]),
    ],
)
def test_numbers_of_modules(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are checked
        make()
    check_message(caught.value, words)


@pytest.mark.parametrize("name", [n for n in fastinstance.__all__ if n.endswith("Loss")])
def test_a_misspelt_setting_is_an_error(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"^expected arguments of {name} among .*, got sigmoidd; did you mean sigmoid\?$"
    ):
        getattr(fastinstance, name)(sigmoidd=True)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("DiceLoss", {"threshold": 0.3}),
        ("DiceLoss", {"pixel_loss": "ce"}),
        ("DiceLoss", {"process_group": "world"}),
        ("BlobLoss", {"average": "image"}),
        ("BlobLoss", {"missed": "soft"}),
        ("CCLoss", {"min_size": 3}),
        ("ComponentTverskyLoss", {"average": "image"}),
        ("ComponentMILLoss", {"pixel_loss": "ce"}),
        ("LesionRecallLoss", {"spacing": 2.0}),
    ],
)
def test_a_setting_of_another_loss_is_an_error(name: str, setting: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"^expected arguments of {name} among .*, got {next(iter(setting))}\b"):
        getattr(fastinstance, name)(**setting)


@pytest.mark.parametrize(
    ("mask", "options", "exception", "words"),
    [
        ([[1]], {}, TypeError, ["mask", "tensor", "list"]),
        (TARGET[0, 0], {}, ValueError, ["mask [B,C,H,W]", "(4, 5)"]),
        (TARGET.to(torch.complex64), {}, TypeError, ["mask", "real", "complex64"]),
        (TARGET, {"connectivity": 6}, ValueError, ["connectivity", "(4, 8)", "6"]),
        (TARGET[:, :, None], {"connectivity": 8}, ValueError, ["connectivity", "(6, 18, 26)", "3D", "8"]),
        (TARGET, {"min_size": -2}, ValueError, ["min_size", "integer >= 0", "-2"]),
        (TARGET, {"min_size": True}, ValueError, ["min_size", "integer >= 0", "True"]),
    ],
)
def test_label(mask: Any, options: dict[str, Any], exception: type[Exception], words: list[str]) -> None:
    with pytest.raises(exception) as caught:
        fastinstance.label(mask, **options)
    check_message(caught.value, words)


@pytest.mark.parametrize("enabled", [True, False])
def test_values_are_always_checked_on_the_cpu(enabled: bool) -> None:
    fastinstance.debug_checks(enabled)
    try:
        with pytest.raises(ValueError, match="expected target to hold only 0 and 1"):
            call(functional.instance_terms, {"target": TARGET * 2})
    finally:
        fastinstance.debug_checks(False)


def test_a_refused_call_leaves_its_tensors_alone() -> None:
    tensors = [LOGITS.clone(), with_value(TARGET, 0.5)]
    kept = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match="expected target to hold only 0 and 1"):
        functional.instance_terms(*tensors, sigmoid=True)
    assert all(torch.equal(one, other) for one, other in zip(tensors, kept, strict=True))


WRONG_KINDS = (None, True, "x", -1, NAN, INF, [], (), object(), 3.5, {}, b"x", 1 + 2j)
"""What somebody may hand over by mistake; what an argument takes is said beside it."""
MASK = TARGET > 0
CRITERION = fastinstance.DiceLoss()
FITS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[object, ...]]]] = {
    # callable, a good call, and for each argument which of these it takes
    "InstanceLoss": (
        lambda **options: fastinstance.InstanceLoss(**options)(LOGITS, TARGET),
        {"sigmoid": True},
        {
            **dict.fromkeys(("seg", "instance_gt", "center", "proximity"), (True, -1, 3.5)),
            **dict.fromkeys(("include_background", "mask_target", "sigmoid"), (True,)),
            **dict.fromkeys(("softmax", "to_onehot_y"), ()),
            **dict.fromkeys(("connectivity", "max_instances", "other_act", "process_group"), (None,)),
            **dict.fromkeys(("average", "missed", "pixel_loss", "reduction", "min_size", "threshold", "weight_by"), ()),
            "spacing": (None, 3.5),
        },
    ),
    "DiceLoss": (
        lambda **options: fastinstance.DiceLoss(sigmoid=True, **options)(LOGITS, TARGET),
        {},
        {**dict.fromkeys(("squared_pred", "jaccard"), (True,)), "smooth_nr": (True, 3.5)},
    ),
    "CCLoss": (
        fastinstance.CCLoss(sigmoid=True),
        {"input": LOGITS, "target": TARGET},
        {"input": (), "target": (), "target_labels": (None,), "target_regions": (None,), "valid_mask": (None,)},
    ),
    "InstanceMetrics": (
        lambda **options: fastinstance.InstanceMetrics(**options).update(MASK, TARGET),
        {"channels": 2},
        {
            **dict.fromkeys(("matching", "threshold", "min_size", "confidence", "resamples", "seed", "channels"), ()),
            **dict.fromkeys(("connectivity", "by_volume"), (None,)),
            "spacing": (None, 3.5),
            "zero_division": (True, NAN),
        },
    ),
    "instance_metrics": (
        fastinstance.instance_metrics,
        {"pred": MASK, "target": TARGET},
        {"pred": (), "target": (), "pred_labels": (None,), "target_labels": (None,), "connectivity": (None,)},
    ),
    "label": (fastinstance.label, {"mask": MASK}, {"mask": (), "connectivity": (None,), "min_size": ()}),
    "voronoi": (fastinstance.voronoi, {"labels": LABELS}, {"labels": (), "spacing": (None, 3.5)}),
    "majority_vote": (fastinstance.majority_vote, {}, {"masks": ()}),
    "volume_ensemble": (
        fastinstance.volume_ensemble,
        {"small": MASK, "large": MASK, "spacing": 1.0},
        {"small": (), "large": (), "threshold_ml": (3.5,), "spacing": (None, 3.5), "connectivity": (None,)},
    ),
    "band_ensemble": (
        fastinstance.band_ensemble,
        {"masks": [MASK, MASK], "edges_ml": [0.1], "spacing": 1.0},
        {"masks": (), "edges_ml": (), "spacing": (None, 3.5)},
    ),
    "compat.InstanceLoss": (
        lambda **options: compat.InstanceLoss(
            CRITERION, CRITERION, CRITERION, **{"activation": "none", "spatial_dims": 2, "mul_too_many": INF, **options}
        ),
        {},
        {
            **dict.fromkeys(("instance_wise_loss_no_tp", "rate_instead_number", "weighted_fdr"), (True,)),
            **dict.fromkeys(("activation", "spatial_dims", "reduce_segmentation", "min_instance_size"), ()),
        },
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_wrong_kinds(name: str) -> None:
    """Whatever an argument is given: it is taken, or the error names it and says what came."""
    function, good, arguments = FITS[name]
    for argument, fitting in arguments.items():
        for kind in WRONG_KINDS:
            if any(kind is one for one in fitting):
                function(**{**good, argument: kind})
                continue
            with pytest.raises((ValueError, TypeError)) as caught:
                function(**{**good, argument: kind})
            check_message(caught.value, [argument])


def test_wrong_kinds_elsewhere() -> None:
    with pytest.raises(TypeError, match="expected sample_target to be a tensor, got list"):
        fastinstance.make_graphed(CRITERION, torch.empty(0, device="meta"), [])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected enabled to be True or False, got 'False'"):
        fastinstance.debug_checks("False")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"expected masks\[1\] to be a tensor, got None"):
        fastinstance.majority_vote([MASK, None])  # pyright: ignore[reportArgumentType]
