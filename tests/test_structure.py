"""The house: imports go downward, importing is light, and what is shipped is complete."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastinstance
from tests.lines import lines_executed

ROOT = Path(__file__).parent.parent
# A module may import from the layers above its own in this list (and from its own).
LAYERS = [
    {"testing.comparison", "testing.strategies"},
    {"testing.properties"},
    {"backend", "boxes", "checks", "criteria", "files", "fused", "graphs", "pixel", "ranks", "segments", "summary"},
    {"components", "ops", "parallel", "planes", "regions", "settings", "torch_func"},
    {"partition"},
    {"masked", "matching", "terms"},
    {"reference", "scene"},
    {"compat", "torch_backend", "triton_backend"},
    {"dispatch"},
    {"functional", "losses", "metrics"},
    {"accumulate", "componentwise", "ensemble", "overlay"},
    {"commands"},
    {"integrations.lightning", "integrations.nnunet.trainers"},
    {"study.brain", "study.subjects"},
    {"study.config", "study.sources", "study.statistics", "study.workers"},
    {"study.augment", "study.checkpoints", "study.data", "study.evaluation", "study.networks"},
    {"study.batches", "study.measure", "study.plan"},
    {"study.training", "study.splits"},
    {"study.cells", "study.runs"},
    {"study.results"},
    {"study.outcomes"},
    {"study.figures", "study.tables"},
    {"study.commands"},
    {"study.demo"},
    {"arguments"},
    {"__main__"},
]


def _imports(path: Path, module: str) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            parents = module.split(".")[: -node.level]
            base = parents + base
        elif base[:1] == ["fastinstance"]:
            base = base[1:]
        else:
            continue
        names = [".".join([*base, alias.name]) for alias in node.names]
        known = [name for name in names if any(name in layer for layer in LAYERS)]
        found.update(known or [".".join(base)])
    return found - {"", "study"}


def test_imports_go_downward():
    rank = {module: level for level, layer in enumerate(LAYERS) for module in layer}
    package = ROOT / "fastinstance"
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        assert module in rank, f"{module} has no layer: add it to LAYERS"
        for imported in _imports(path, module):
            assert rank[imported] <= rank[module], f"{module} imports {imported}, which lies above it"


def test_the_kernels_know_nothing_of_the_library():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "triton"}, (path.name, name)


def test_importing_is_light():
    code = "import sys, fastinstance; print(*[m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    optional = {
        "monai",
        "kornia",
        "scipy",
        "matplotlib",
        "hypothesis",
        "nilearn",
        "lightning",
        "nnunetv2",
        "torchmetrics",
    }
    assert optional.isdisjoint(loaded.split())


def test_the_public_names_exist():
    assert sorted(fastinstance.__all__) == fastinstance.__all__
    assert all(hasattr(fastinstance, name) for name in fastinstance.__all__)


def _step(instances: int) -> None:
    """A forward pass of so many instances on either side."""
    target = torch.zeros(2, 1, 40, 40)
    target[0, 0].view(-1)[torch.arange(instances) * 80] = 1  # every second row, one pixel each, 40 columns apart
    target[1] = target[0]
    fastinstance.functional.instance_terms(target * 8 - 4, target, sigmoid=True, pixel_loss="inverse_weighted_dice")
    fastinstance.functional.blob_terms(target * 8 - 4, target, sigmoid=True)


def test_no_python_iteration_over_instances():
    _step(3)  # forms of losses are worked out once
    assert lines_executed(lambda: _step(3)) == lines_executed(lambda: _step(19))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True, capture_output=True
    )
    return out


def test_the_wheel_holds_both_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastinstance/__init__.py", "fastinstance/py.typed", "fastinstance_kernels/__init__.py"} <= names
    top = {name.split("/")[0] for name in names}
    assert top == {"fastinstance", "fastinstance_kernels", f"fastinstance-{fastinstance.__version__}.dist-info"}


def test_the_sdist_can_run_the_tests(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "tests/test_structure.py",
        "bench/cpu.py",
        "notebooks/01_instances.py",
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "README.md",
    } <= names
    assert not any(name.startswith((".venv", "demo", "dist")) for name in names)
