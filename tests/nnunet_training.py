"""nnU-Net plans, preprocesses and trains on generated images; run by tests/test_nnunet.py in a process of its own.

Arguments: a folder to work in, and the folders of the trainers. The findings are written to `found.json` there.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import nibabel as nib
import numpy as np
import torch

WORK = Path(sys.argv[1])
SOFTMAX, REGIONS = 1, 2
DATASETS = {
    SOFTMAX: {"labels": {"background": 0, "lesion": 1, "core": 2, "ignore": 3}},
    REGIONS: {
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
    },
}
TRAINED = [(SOFTMAX, "ICI"), (REGIONS, "False"), (SOFTMAX, "Proximity"), (REGIONS, "Blob")]


def prepare_environment() -> None:
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(WORK / kind)
    os.environ |= {"nnUNet_extTrainer": sys.argv[2], "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # only transformers need it, but nnU-Net's search imports all its trainers
        names = ("timm", "timm.layers", "timm.models", "timm.models.eva")
        sys.modules.update(dict.fromkeys(names, MagicMock()))
    real = multiprocessing.get_context
    threads = types.SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)  # processes take seconds to start
    multiprocessing.get_context = lambda method=None: threads if method == "spawn" else real(method)  # pyright: ignore


def write_images(number: int) -> None:
    """Volumes with small lesions; the left border is not annotated."""
    chance = np.random.default_rng(0)
    folder = WORK / "raw" / f"Dataset{number:03d}_Tiny"
    for case in range(3):
        labels = np.zeros((16, 16, 16), np.uint8)
        for z, y, x in chance.integers(0, 12, (8, 3)):
            labels[z : z + 3, y : y + 3, x : x + 3] = 1
            labels[z, y : y + 2, x : x + 2] = 2
        image = labels + chance.normal(0, 0.3, labels.shape)
        labels[:, :3] = 3
        for kind, volume, suffix in (("imagesTr", image.astype(np.float32), "_0000"), ("labelsTr", labels, "")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / kind / f"case{case}{suffix}.nii.gz")  # pyright: ignore
    about = {"channel_names": {"0": "MRI"}, "numTraining": 3, "file_ending": ".nii.gz", **DATASETS[number]}
    (folder / "dataset.json").write_text(json.dumps(about))


def plan_and_preprocess(number: int) -> None:
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    class Extractor(DatasetFingerprintExtractor):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.num_foreground_voxels_for_intensitystats = 1e4

    api.extract_fingerprint_dataset(number, Extractor, num_processes=1)
    api.plan_experiments([number])
    path = next((WORK / "preprocessed").glob(f"Dataset{number:03d}*")) / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4] * network["n_stages"]
    path.write_text(json.dumps(plans))
    api.preprocess([number], configurations=("3d_fullres",), num_processes=(1,))


def trainer_for(number: int, name: str) -> Any:
    from nnunetv2.run.run_training import get_trainer_from_args

    return get_trainer_from_args(str(number), "3d_fullres", "all", f"nnUNetTrainer{name}", device=torch.device("cpu"))


def train(number: int, name: str) -> dict[str, Any]:
    """Two epochs of one iteration: the losses, and by how much the network has changed."""
    torch.manual_seed(0)
    trainer = trainer_for(number, name)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1, 1
    trainer.initialize()
    before = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    trainer.run_training()
    change = torch.cat([p.detach().flatten() for p in trainer.network.parameters()]) - before
    log = (Path(trainer.output_folder) / Path(trainer.log_file).name).read_text()
    return {
        "bases": [base.__name__ for base in type(trainer).__mro__],
        "change": change.norm().item(),
        "losses": [float(line.split()[-1]) for line in log.splitlines() if "_loss" in line],
        "switches": [line.split(": ", 1)[1].strip() for line in log.splitlines() if "Instance terms" in line],
        "checkpoint": (Path(trainer.output_folder) / "checkpoint_final.pth").is_file(),
    }


def compare_with_the_formula(number: int, name: str) -> dict[str, float]:
    """The trainer's loss of drawn outputs, and the same put together by hand from nnU-Net's loss and our terms."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    import fastinstance

    trainer, plain = trainer_for(number, name), trainer_for(number, "")
    assert type(plain) is nnUNetTrainer
    loss, own = trainer._build_loss(), plain._build_loss()
    regions = number == REGIONS
    chance = torch.Generator().manual_seed(number)
    outputs, targets, expected = [], [], torch.zeros(())
    how = {"sigmoid": True} if regions else {"softmax": True, "to_onehot_y": True, "include_background": False}
    for scale, weight in enumerate(own.weight_factors):
        size = (12 >> scale, 16 >> scale, 16 >> scale)
        output = 2 * torch.randn(2, 2 if regions else 3, *size, generator=chance)
        labels = torch.randint(0, 40, (2, 1, *size), generator=chance).clamp(max=4).sub(1).abs()  # 3 is most frequent
        labels = torch.where(labels == 3, 0, labels)
        labels[..., :2, :] = 3
        target = torch.cat([(labels == 1) | (labels == 2), labels == 2, labels == 3], 1) if regions else labels.float()
        outputs.append(output)
        targets.append(target)
        read = {"valid_mask": labels != 3, **how}
        clean = target[:, :2] if regions else torch.where(labels == 3, 0, labels)
        if name == "Blob":
            terms = 2 * own.loss(output, target)
            terms = terms + fastinstance.functional.blob_terms(output, clean, pixel_loss="dicece", **read).blob
        else:
            found = fastinstance.functional.instance_terms(output, clean, **read)
            pixel = own.loss(output, target)
            terms = {
                "ICI": 0.25 * pixel + 0.5 * found.instance_gt + 0.25 * found.center,
                "False": pixel + found.false_gt + found.false_pred,
                "Proximity": pixel + 0.1 * found.proximity,
            }[name]
        expected = expected + weight * terms
    with torch.autocast("cpu", torch.float16):
        half = loss([output.half() for output in outputs], targets)
    ignored = [torch.ones_like(t) if regions else torch.full_like(t, 3) for t in targets]
    leaf = outputs[0].clone().requires_grad_()
    nothing = loss([leaf, *outputs[1:]], ignored)
    nothing.backward()
    assert leaf.grad is not None
    return {
        "loss": loss(outputs, targets).item(),
        "expected": expected.item(),
        "half": half.item(),
        "all ignored": nothing.item(),
        "its gradient": leaf.grad.abs().max().item(),
    }


def main() -> None:
    prepare_environment()
    for number in DATASETS:
        write_images(number)
        plan_and_preprocess(number)
    os.environ |= {"nnUNet_n_proc_DA": "0"}
    names = ("ICI", "False", "Proximity", "Blob")
    found = {
        "trained": {name: train(number, name) for number, name in TRAINED},
        "compared": {
            f"{name} {labels}": compare_with_the_formula(number, name)
            for number, labels in ((SOFTMAX, "softmax"), (REGIONS, "regions"))
            for name in names
        },
        "own": str(trainer_for(SOFTMAX, "Mine")._build_loss()),
    }
    (WORK / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
