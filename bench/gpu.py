"""`python -m bench gpu`: steps of the losses on a GPU beside MONAI's GDF, eager and as CUDA graphs.

A sample is one step on each of several input sets, so that the inputs of a step are not in the cache already, divided
by their number; the device is idle before the first. A step is forward and backward, to the gradient of the logits.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastinstance as fi

from .scenes import PAPER, WEIGHTS, Scene, balls, noise, specks, spread
from .timing import Time, copy_bandwidth, graphed, machine, rounds

__all__ = ["cases", "main", "run", "table"]

Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[], Any]
Row = dict[str, Any]

SETS = 3
RUNS = {  # key -> heading
    "ours": "ours",
    "ours, graph": "graph",
    "ours, forward": "forward",
    "labels given": "labels given",
    "labels given, graph": "graph",
    "our GDF": "our GDF",
    "our GDF, graph": "graph",
    "MONAI GDF": "MONAI GDF",
    "MONAI GDF, graph": "graph",
}


@dataclass(frozen=True)
class Case:
    """Inputs by seed, and their type."""

    scene: Callable[[int], Scene]
    dtype: torch.dtype = torch.float32


def cases(*, small: bool = False) -> dict[str, Case]:
    """All cases; `small` ones only show that everything runs."""
    shape = (2, 32, 32) if small else PAPER
    volume = (1, 12, 16, 16) if small else (2, 128, 128, 128)
    numbers = (2, 4, 8, 16) if small else (10, 100, 1000, 10000)

    def paper(seed: int) -> Scene:
        return balls(shape, *((3, 4) if small else (15, 20)), (2, 3 if small else 7), seed=seed)

    found = {
        "48×256², 15 + 20 instances": Case(paper),
        "48×256², 15 + 20 instances, bfloat16": Case(paper, torch.bfloat16),
        "48×256², noise, 3,000 specks a plane": Case(lambda seed: noise(paper(seed), shift=-1.55, seed=seed)),
        "2×128³, 100 + 100 instances": Case(
            lambda seed: balls(volume, *((2, 2) if small else (100, 100)), (2, 7), seed=seed)
        ),
    }
    for number in numbers:
        name = f"48×256², {number} + {number} in the batch, 3 % foreground"
        found[name] = Case(partial(_spread, shape, number))
    found["1024², 65,536 + 65,536 pixels"] = Case(lambda seed: specks(32 if small else 1024, seed=seed))
    return found


def _spread(shape: tuple[int, ...], number: int, seed: int) -> Scene:
    return spread(shape, number, 0.03, seed=seed)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block after some seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _recorded(errors: dict[str, str], name: str) -> Iterator[None]:
    """One thing that fails is a line in the results, and the others are still measured."""
    try:
        yield
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {str(error).strip()[:500]}"
        print(f"  {name}: {errors[name]}", flush=True)


def _step(loss: Loss, scene: Scene) -> Step:
    logits = scene.logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(logits, scene.target)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return step


def _deviation(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Largest deviation of value and gradient, relative to the truth's largest."""

    def relative(mine: Tensor, true: Tensor) -> float:
        mine, true = mine.detach().cpu().double(), true.double()
        error = float((mine - true).abs().max() / true.abs().max().clamp(min=1e-30))
        return error if error == error else float("inf")

    return max(map(relative, found, truth))


def _synchronisations(step: Step) -> Counter[str]:
    """Places where a step waits for the device."""
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)


def _kernels(steps: list[Step]) -> list[Row]:
    """What the device does in a step: name, launches a step, µs a step; the longest first."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the first profile of a process can lack events
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for step in steps:
                step()
            torch.cuda.synchronize()
    count: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for event in profiled.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            micros[event.name] += event.time_range.elapsed_us()
    return [
        {"kernel": name[:160], "launches": count[name] / len(steps), "µs": round(total / len(steps), 3)}
        for name, total in micros.most_common()
    ]


def _peak(step: Step) -> int:
    """Bytes allocated at the peak of a step, beside its input and what it returns."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result[1].numel() * result[1].element_size()


def _measure(row: Row, case: Case, device: str, *, repeats: int, seconds: float) -> None:
    """Fill the row of a case."""
    errors = row["errors"]
    made = [case.scene(seed) for seed in range(SETS)]
    made = [scene._replace(logits=scene.logits.to(case.dtype)) for scene in made]
    scenes = [Scene(*(tensor.to(device) for tensor in scene)) for scene in made]
    ours = fi.InstanceLoss(**WEIGHTS, sigmoid=True)
    labels = [fi.label(scene.target) for scene in made]
    row["pixels"] = made[0].logits.numel()
    row["instances"] = sum(int(counts.sum()) for _, counts in labels) // SETS
    row["predicted"] = sum(int(fi.label(scene.logits >= 0)[1].sum()) for scene in made) // SETS
    row["bytes_at_least"] = 2 * made[0].logits.element_size() + made[0].target.element_size()

    # No time for a wrong result.
    truths = [_step(ours, scene)() for scene in made]
    row["deviation"] = max(_deviation(_step(ours, scene)(), truth) for scene, truth in zip(scenes, truths, strict=True))
    allowed = 1e-4 if case.dtype == torch.float32 else 2 * torch.finfo(case.dtype).eps
    if row["deviation"] > allowed:
        errors["ours"] = f"wrong: value or gradient differs by {row['deviation']:.2g} from the CPU's"
        return

    found = [ids.to(device) for ids, _ in labels]
    givens = [lambda x, y, ids=ids: ours(x, y, target_labels=ids) for ids in found]
    gdf = fi.GeneralizedDiceFocalLoss(sigmoid=True)
    competitors: dict[str, list[Step]] = {
        "ours": [_step(ours, scene) for scene in scenes],
        "labels given": [_step(given, scene) for given, scene in zip(givens, scenes, strict=True)],
        "our GDF": [_step(gdf, scene) for scene in scenes],
    }
    with _recorded(errors, "MONAI GDF"):
        from monai.losses import GeneralizedDiceFocalLoss

        competitors["MONAI GDF"] = [_step(GeneralizedDiceFocalLoss(sigmoid=True), scene) for scene in scenes]
    runs: dict[str, list[Step]] = {}
    for name, steps in competitors.items():
        with _recorded(errors, name):
            for step in steps:
                step()
            runs[name] = steps
            if device == "cuda":
                row["bytes_per_pixel"][name] = round(_peak(steps[0]) / row["pixels"], 2)
                row["kernels"][name] = _kernels(steps)
    runs["ours, forward"] = [partial(ours, scene.logits.clone().requires_grad_(), scene.target) for scene in scenes]
    if device == "cuda":
        for name in competitors:
            with _recorded(errors, f"{name}, graph"):
                waits = _synchronisations(competitors[name][0])
                row["synchronisations"][name] = waits
                if waits:
                    raise RuntimeError(f"not captured, {waits.total()} synchronisations")
                replays = [graphed(step) for step in competitors[name]]
                for replay, step in zip(replays, competitors[name], strict=True):
                    replay()
                    truth = tuple(tensor.cpu() for tensor in step())
                    if (error := _deviation(replay(), truth)) > allowed:
                        raise ValueError(f"wrong: the graph's result differs by {error:.2g}")
                runs[f"{name}, graph"] = replays
    order = [name for name in RUNS if name in runs]
    measured = rounds({name: runs[name] for name in order}, repeats=repeats, seconds=seconds)
    row["milliseconds"] = {name: _milliseconds(value) for name, value in measured.items()}


def _milliseconds(value: Time) -> dict[str, float]:
    return {key: round(part, 5) for key, part in value._asdict().items()}


def _unet(row: Row, case: Case, device: str, *, repeats: int, seconds: float, autocast: bool) -> None:
    """Steps of a whole training with MONAI's U-Net, whose output moves the logits of the scene a little."""
    from monai.losses import GeneralizedDiceFocalLoss
    from monai.networks.nets import UNet

    scenes = [Scene(*(tensor.to(device) for tensor in case.scene(seed))) for seed in range(SETS)]
    net = UNet(2, 1, 1, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6, fused=True)

    def step(loss: Loss, scene: Scene) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            moved = net(scene.target)
        loss(torch.add(scene.logits, moved.float(), alpha=1e-3), scene.target).backward()
        optimizer.step()

    losses: dict[str, Loss] = {
        "mean of the logits": lambda logits, _: logits.mean(),
        "ours": fi.InstanceLoss(**WEIGHTS, sigmoid=True),
        "our GDF": fi.GeneralizedDiceFocalLoss(sigmoid=True),
        "MONAI GDF": GeneralizedDiceFocalLoss(sigmoid=True),
    }
    runs = {name: [partial(step, loss, scene) for scene in scenes] for name, loss in losses.items()}
    measured = rounds(runs, repeats=repeats, seconds=seconds)
    row["milliseconds"] = {name: _milliseconds(value) for name, value in measured.items()}


def authors(path: str) -> Loss:
    """The implementation of Rachmadi et al. at `path`, all terms, without its caps on the number of instances."""
    sys.path.insert(0, path)
    from losses.InstanceLoss import InstanceLoss  # pyright: ignore[reportMissingImports]
    from monai.losses import DiceLoss, GeneralizedDiceFocalLoss

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        dice = DiceLoss()
        module = InstanceLoss(
            GeneralizedDiceFocalLoss(sigmoid=True),
            dice,
            dice,
            spatial_dims=target.ndim - 2,
            max_cc_out=0,
            mul_too_many=1 << 40,
            centroid_offset=1,
            rate_instead_number=True,
        )
        seg, truth, pred, center, false_pred, false_gt, proximity = module(logits, target)
        terms = {
            "seg": seg,
            "instance_gt": truth,
            "instance_pred": pred,
            "center": center,
            "false_gt": false_gt,
            "false_pred": false_pred,
            "proximity": proximity,
        }
        return torch.stack([WEIGHTS[name] * value for name, value in terms.items()]).sum()

    return loss


def _peer(row: Row, case: Case, device: str, path: str, seconds: float) -> None:
    """One step of a peer on the first input set, after one on its first image."""
    scene = Scene(*(tensor.to(device) for tensor in case.scene(0)))
    loss = authors(path)
    with _limited(seconds):
        _step(loss, Scene(*(tensor[:1] for tensor in scene)))()
        row["milliseconds"] = _milliseconds(rounds({"": [_step(loss, scene)]}, repeats=1, warmup=0)[""])


def run(
    *,
    repeats: int = 50,
    seconds: float = 8,
    deadline: float = 240,
    small: bool = False,
    only: str = "",
    peers: dict[str, str] | None = None,
    peer_seconds: float = 60,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure all cases, at most `seconds` of repetitions each, begin none after `deadline` seconds; then the peers.

    `save` gets the results so far after each case.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    result: dict[str, Any] = {"bench": "gpu", "device": device, "rows": [], "unet": [], "peers": []}
    result["copy_bytes_per_second"] = copy_bandwidth(device)
    chosen = {name: case for name, case in cases(small=small).items() if only in name}
    first = next(iter(cases(small=small).values()))

    def row(kind: str, name: str, measure: Callable[[Row], None], limit: float) -> None:
        found: Row = {"case": name, "errors": {}, "milliseconds": {}}
        found |= {key: {} for key in ("synchronisations", "bytes_per_pixel", "kernels")} if kind == "rows" else {}
        result[kind].append(found)
        start = time.monotonic()
        with _recorded(found["errors"], "case"):
            if kind != "peers" and start - begin > deadline:
                raise TimeoutError("not run, no time left")
            with _limited(limit):
                measure(found)
        found["seconds"] = round(time.monotonic() - start, 1)
        medians = {key: value["median"] for key, value in found["milliseconds"].items() if isinstance(value, dict)}
        print(f"{name}: {found['seconds']} s, {medians or found['milliseconds']}", flush=True)
        save(result)

    for name, case in chosen.items():
        row("rows", name, partial(_measure, case=case, device=device, repeats=repeats, seconds=seconds), 60 + seconds)
    for autocast in (False, True):
        name = "bfloat16 autocast" if autocast else "float32"
        measure = partial(_unet, case=first, device=device, repeats=repeats, seconds=seconds, autocast=autocast)
        row("unet", name, measure, 30 + seconds)
    for name, path in (peers or {}).items():
        measure = partial(_peer, case=first, device=device, path=path, seconds=peer_seconds)
        row("peers", name, measure, peer_seconds + 20)
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: medians in milliseconds, what fell short, and the kernels of the first case."""
    lines: list[str] = []

    def add(head: list[str], rows: list[list[object]]) -> None:
        lines.extend(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)])
        lines.extend("| " + " | ".join(map(str, cells)) + " |" for cells in rows)
        lines.append("")

    def time_of(row: Row, name: str) -> str:
        if name in row["milliseconds"]:
            return f"{row['milliseconds'][name]['median']:.3f}"
        return "—" if name in row["errors"] else ""

    rows = []
    for row in result["rows"]:
        medians = {name: value["median"] for name, value in row["milliseconds"].items()}
        best = medians.get("ours, graph", medians.get("ours"))
        ratio = {
            kind: f"{medians[f'ours{kind}'] / medians[f'MONAI GDF{kind}']:.2f}"
            if {f"ours{kind}", f"MONAI GDF{kind}"} <= medians.keys()
            else ""
            for kind in ("", ", graph")
        }
        cells = [row["case"], row.get("instances", ""), row.get("predicted", "")]
        cells += [time_of(row, name) for name in RUNS] + list(ratio.values())
        copied = row.get("bytes_at_least", 0) * row.get("pixels", 0) / result["copy_bytes_per_second"]
        cells.append(f"{1e3 * copied / best:.1%}" if best else "")
        kernels = row["kernels"].get("ours", [])
        cells.append(f"{sum(kernel['launches'] for kernel in kernels):.0f}" if kernels else "")
        cells.append(f"{sum(kernel['µs'] for kernel in kernels):.0f}" if kernels else "")
        cells.append(sum(row["synchronisations"].get("ours", {}).values()))
        cells.append(row["bytes_per_pixel"].get("ours", ""))
        rows.append(cells)
    head = ["case", "N", "M", *RUNS.values(), "ratio", "ratio, graphs", "of copy", "launches", "kernels, µs", "waits"]
    add([*head, "B/px"], rows)
    names = ["mean of the logits", "ours", "our GDF", "MONAI GDF"]
    steps = []
    for row in result["unet"]:
        cells = [row["case"], *(time_of(row, name) for name in names)]
        if row["milliseconds"]:
            base = row["milliseconds"]["mean of the logits"]["median"]
            cells += [f"{1 - base / row['milliseconds'][name]['median']:.1%}" for name in ("ours", "MONAI GDF")]
        steps.append(cells)
    add(["U-Net step, ms", *names, "share of ours", "share of MONAI's"], steps)
    lines.extend(f"{row['case']}, one step: {row['milliseconds'].get('median', '—')} ms" for row in result["peers"])
    for row in (*result["rows"], *result["unet"], *result["peers"]):
        lines.extend(
            f"{row['case']}: {name}: {error.splitlines()[0]}" for name, error in row["errors"].items() if error
        )
    for row in result["rows"][:1]:
        for name, kernels in row["kernels"].items():
            cells = [[k["kernel"][:70].replace("|", "/"), f"{k['launches']:.1f}", f"{k['µs']:.1f}"] for k in kernels]
            lines.append("")
            add([f"{name}: kernel", "launches", "µs"], cells[:25])
        waits = row["synchronisations"].get("ours")
        lines.extend(["waits of ours: " + ", ".join(f"{where} ×{n}" for where, n in waits.items())] if waits else [])
    lines.append(f"copy bandwidth {result['copy_bytes_per_second'] / 1e9:.0f} GB/s, on {result['device']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, and write the figures after each case."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=50, help="samples of each run (default 50)")
    parser.add_argument("--seconds", type=float, default=8, help="of repetitions a case at most (default 8)")
    parser.add_argument("--deadline", type=float, default=240, help="seconds after which no case begins (default 240)")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to see that all of it runs")
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--peer", action="append", default=[], metavar="instance-loss=PATH", help="the authors' code")
    parser.add_argument("--peer-seconds", type=float, default=60, help="for a peer at most (default 60)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = vars(parser.parse_args(argv))
    out: Path | None = options.pop("out")
    options["peers"] = dict(peer.split("=", 1) for peer in options.pop("peer"))

    def save(result: dict[str, Any]) -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**result, "machine": machine()}, indent=1, ensure_ascii=False) + "\n")

    result = run(**options, save=save)
    print("\n" + table(result))
