"""Two processes, each with a part of the batch, are one process with all of it: values, gradients, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastinstance
from fastinstance import functional
from fastinstance.testing import assert_close

RANKS = 2
SPLIT = (2, 3)  # images of the two ranks
EVERY = dict(zip(fastinstance.InstanceTerms._fields, (0.5, 1.5, -2.0, 0.25, 3.0, 0.75, 0.01), strict=True))
MODES = {"missed": "soft", "weight_by": "size", "mask_target": False, "proximity_reduction": "sum"}

Loss = Callable[..., nn.Module]
CASES: dict[str, tuple[Loss, dict[str, Any]]] = {
    "every term": (fastinstance.InstanceLoss, EVERY),
    "average over images": (fastinstance.InstanceLoss, {**EVERY, "average": "image"}),
    "over true instances": (fastinstance.InstanceLoss, {**EVERY, "pred_normalizer": "gt", "min_size": 2}),
    "both sides": (fastinstance.InstanceLoss, {"instance_gt": 1, "instance_pred": 2}),
    "sum": (fastinstance.InstanceLoss, {**EVERY, "reduction": "sum"}),
    "ICI": (fastinstance.ICILoss, {}),
    "false": (fastinstance.FalseLoss, {"pixel_loss": "dicece"}),
    "proximity": (fastinstance.ProximityLoss, {"pixel_loss": "inverse_weighted_dice"}),
    "only pixels": (fastinstance.InstanceLoss, {}),
    "soft, by size": (fastinstance.InstanceLoss, {**EVERY, **MODES}),
    "weights of one's own": (fastinstance.InstanceLoss, {**EVERY, "weight_by": lambda size: 0.25 + size / 8}),
    "blob": (fastinstance.BlobLoss, {}),
    "blob, sum": (fastinstance.BlobLoss, {"reduction": "sum", "instance_loss": "dice"}),
    "CC": (fastinstance.CCLoss, {}),
    "CC, average over images": (fastinstance.CCLoss, {"average": "image", "pixel_loss": "dice"}),
    "component Tversky": (fastinstance.ComponentTverskyLoss, {"min_size": 2}),
    "component MIL": (fastinstance.ComponentMILLoss, {}),
    "lesion recall": (fastinstance.LesionRecallLoss, {"false_positive": 0.5}),
    "lesion recall, sum": (fastinstance.LesionRecallLoss, {"reduction": "sum"}),
}
SCENES = ("usual", "no instance on rank 0", "no instance on rank 1", "nothing on rank 0", "nothing at all")
KERNELS = ("both sides", "lesion recall", "blob")
"""Cases that run on the Triton kernels too, in the interpreter."""


def scene(name: str) -> tuple[Tensor, Tensor]:
    """Images and target of the whole batch: rank 0 has few instances, rank 1 many."""
    chance = torch.Generator().manual_seed(1)
    noise = torch.randn(2, sum(SPLIT), 1, 10, 12, generator=chance, dtype=torch.float64)
    image, score = nn.functional.avg_pool2d(noise.flatten(0, 2), 3, 1, 1).view_as(noise)
    target = image + 0.3 * score > 0.25
    target[: SPLIT[0], ..., 4:] = False
    if name == "no instance on rank 0":
        target[: SPLIT[0]] = False
    elif name == "no instance on rank 1":
        target[SPLIT[0] :] = False
    elif name == "nothing on rank 0":
        target[: SPLIT[0]], image[: SPLIT[0]] = False, -3
    elif name == "nothing at all":
        target[:], image[:] = False, -3
    return image, target


def part(tensor: Tensor, rank: int) -> Tensor:
    return tensor.split(SPLIT)[rank]


def network() -> nn.Module:
    """It gives each image a value and a slope of its own, and starts near the identity."""
    net = nn.Conv2d(1, 1, 3, padding=1).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.1, 0.2, 0.1], [0.2, 5.0, 0.2], [0.1, 0.2, -0.1]]))
        net.bias.fill_(-0.3)  # pyright: ignore[reportOptionalMemberAccess]
    return net


def step(net: nn.Module, loss: nn.Module, image: Tensor, target: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    value = loss(net(image), target)
    value.backward()
    return {"loss": value.detach(), **{name: p.grad.clone() for name, p in net.named_parameters()}}  # pyright: ignore[reportOptionalMemberAccess]


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train(rank: int, device: str) -> dict[Any, Any]:
    """Every case on every scene, with the gradients that DistributedDataParallel gives."""
    net = DistributedDataParallel(network().to(device))
    return {
        (case, name): step(
            net,
            make(sigmoid=True, process_group="world", **options),
            *(part(tensor, rank).to(device) for tensor in scene(name)),
        )
        for case, (make, options) in CASES.items()
        for name in SCENES
    }


def worker(rank: int, store: str, out: str) -> None:
    """What a rank does; the results go into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=180))
    found = train(rank, "cpu")
    image, target = (part(tensor, rank) for tensor in scene("usual"))
    with fastinstance.use_backend("triton"):
        net = DistributedDataParallel(network())
        for case in KERNELS:
            make, options = CASES[case]
            loss = make(sigmoid=True, process_group="world", **options)
            found[case, "kernels"] = step(net, loss, image, target)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        found[case, "compiled"] = step(net, compiled, image, target)

    logits = 5 * image

    def call(target: Tensor = target, kind: Loss = fastinstance.FalseLoss, **options: Any) -> Tensor:
        return kind(**{"sigmoid": True, "process_group": dist.group.WORLD, **options})(logits, target)

    found["terms"] = fastinstance.FalseLoss(sigmoid=True, process_group="world").terms(logits, target)._asdict()
    found["none"] = call(reduction="none")
    alone = [dist.new_group([r]) for r in range(RANKS)]
    found["alone"] = call(process_group=alone[rank])
    found["act"] = call(sigmoid=False, other_act=lambda x: x.sigmoid())

    errors = {
        "threshold": lambda: call(threshold=(0.5, 0.6)[rank]),
        "loss": lambda: call(pixel_loss=fastinstance.DiceLoss(squared_pred=bool(rank))),
        "weight": lambda: call(false_gt=1.0 + rank),
        "weight of the blobs": lambda: call(kind=fastinstance.BlobLoss, blob_weight=1.0 + rank),
        "reduction": lambda: call(reduction=("none", "mean")[rank]),
        "parameter": lambda: fastinstance.ComponentTverskyLoss(
            sigmoid=True, process_group="world", alpha=0.3 + 0.1 * rank
        )(logits, target),
        "kind": lambda: call(kind=(fastinstance.FalseLoss, fastinstance.BlobLoss)[rank]),
        "channels": lambda: fastinstance.FalseLoss(sigmoid=True, process_group="world")(
            logits.expand(-1, 1 + rank, -1, -1), target
        ),
        "bad target": lambda: call(target + 0.5 * rank),
        "bad shape": lambda: call(target[:, 0] if rank else target),
        "not a member": lambda: call(process_group=alone[1 - rank]),
    }
    found["errors"] = {name: message_of(function) for name, function in errors.items()}
    found["after the errors"] = call()
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def spawn(worker: Callable[..., None], out: Path, *arguments: Any) -> list[dict[Any, Any]]:
    """What each rank found."""
    torch.multiprocessing.spawn(worker, (str(out / "store"), str(out), *arguments), nprocs=RANKS)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return spawn(worker, tmp_path_factory.mktemp("ranks"))


def whole(case: str, name: str = "usual") -> dict[str, Tensor]:
    make, options = CASES[case]
    return step(network(), make(sigmoid=True, **options), *scene(name))


def mean(found: list[dict[Any, Any]], *key: Any) -> Tensor:
    values = [rank[key[0]] if len(key) == 1 else rank[key[0]][key[1]] for rank in found]
    return torch.stack(values).mean(0)


def test_the_scenes_are_uneven() -> None:
    """Otherwise the mean of the ranks' own losses would do as well."""
    for case in ("every term", "average over images", "blob"):
        image, target = scene("usual")
        make, options = CASES[case]
        own = [step(network(), make(sigmoid=True, **options), part(image, r), part(target, r)) for r in range(RANKS)]
        for name, value in whole(case).items():
            error = (torch.stack([one[name] for one in own]).mean(0) - value).norm() / value.norm()
            assert error > 1e-4, (case, name, error)


def check_case(found: list[dict[Any, Any]], case: str, name: str) -> None:
    expected = whole(case, name)
    assert_close(mean(found, (case, name), "loss"), expected.pop("loss"), rtol=1e-7)
    for rank in found:
        for parameter, gradient in expected.items():
            averaged = rank[case, name][f"module.{parameter}"]
            assert_close(averaged, gradient, name=parameter, rtol=1e-6, atol=1e-7, relative_to="largest")


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_batch(found: list[dict[Any, Any]], case: str, name: str) -> None:
    check_case(found, case, name)


@pytest.mark.parametrize(("case", "how"), [(case, "kernels") for case in KERNELS] + [(KERNELS[-1], "compiled")])
def test_on_the_kernels(found: list[dict[Any, Any]], case: str, how: str) -> None:
    check_case([{(case, "usual"): rank[case, how]} for rank in found], case, "usual")


def test_terms_are_global(found: list[dict[Any, Any]]) -> None:
    image, target = scene("usual")
    for name, value in functional.instance_terms(5 * image, target, sigmoid=True)._asdict().items():
        assert_close(mean(found, "terms", name), value, name=name)


def test_what_stays_local(found: list[dict[Any, Any]]) -> None:
    image, target = scene("usual")
    for rank, result in enumerate(found):
        mine = 5 * part(image, rank), part(target, rank)
        assert_close(result["alone"], fastinstance.FalseLoss(sigmoid=True)(*mine))
        assert_close(result["none"], fastinstance.FalseLoss(sigmoid=True, reduction="none")(*mine))


def test_functions_without_a_name_of_their_own_are_alike(found: list[dict[Any, Any]]) -> None:
    image, target = scene("usual")
    assert_close(mean(found, "act"), fastinstance.FalseLoss(sigmoid=True)(5 * image, target))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("threshold", ("'sigmoid': True", "'threshold': 0.6")),
        ("loss", ("'pixel_loss': Dice(", "squared_pred=True")),
        ("weight", ("'false_gt': 1.0", "'false_gt': 2.0")),
        ("weight of the blobs", ("'blob': 1.0", "'blob': 2.0")),
        ("reduction", ("'reduction': 'none'", "")),
        ("parameter", ("'alpha': 0.3", "'alpha': 0.4")),
        ("kind", ("'false_gt': 1.0", "'blob'")),
        ("channels", ("1 channels", "2 channels")),
    ],
)
def test_different_settings_are_an_error_on_every_rank(found: list[dict[Any, Any]], name: str, shown: Any) -> None:
    for rank, result in enumerate(found):
        message = result["errors"][name]
        assert message.startswith("ValueError: expected the same loss on all 2 ranks"), message
        assert f"Rank {rank} has settings" in message
    assert all(text in "".join(rank["errors"][name] for rank in found) for text in shown)
    assert "0x" not in found[0]["errors"][name]


@pytest.mark.parametrize(("name", "error"), [("bad target", "only 0 and 1"), ("bad shape", "add a channel axis")])
def test_the_error_of_one_rank_reaches_the_others(found: list[dict[Any, Any]], name: str, error: str) -> None:
    assert re.match(rf"ValueError: expected target .*{error}", found[1]["errors"][name])
    assert re.match(r"RuntimeError: .*1 of 2 raised an error; see theirs .*rank 0", found[0]["errors"][name])


def test_the_ranks_are_in_step_after_errors(found: list[dict[Any, Any]]) -> None:
    image, target = scene("usual")
    assert_close(mean(found, "after the errors"), fastinstance.FalseLoss(sigmoid=True)(5 * image, target))


def test_a_group_of_others_is_an_error(found: list[dict[Any, Any]]) -> None:
    for result in found:
        assert re.match(r"TypeError: expected process_group .* this rank belongs to", result["errors"]["not a member"])


def test_without_a_process_group_the_world_is_this_process() -> None:
    image, target = scene("usual")
    assert_close(
        fastinstance.ICILoss(sigmoid=True, process_group="world")(image, target),
        fastinstance.ICILoss(sigmoid=True)(image, target),
    )
    assert "process_group='world'" in repr(fastinstance.ICILoss(process_group="world"))


@pytest.mark.parametrize("wrong", ["default", 0, True])
def test_wrong_kinds_of_group(wrong: object) -> None:
    with pytest.raises(TypeError, match=rf"expected process_group to be None, 'world' or .*, got {wrong!r}"):
        functional.blob_terms(*scene("usual"), process_group=wrong)  # pyright: ignore[reportArgumentType]
