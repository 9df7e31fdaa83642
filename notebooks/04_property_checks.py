# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Test a loss of your own
#
# A wrong loss does not crash. It trains a network that is a little worse, and nobody knows why. `fastinstance.testing`
# holds the tools that this library is tested with, for your losses too:
#
# - `check_loss(loss)` tries 14 properties that every segmentation loss should have;
# - `scenes()` is a Hypothesis strategy that draws pairs of prediction and target, from one pixel to spirals;
# - `assert_close` compares and says *where* two results differ.
#
# [Hypothesis](https://hypothesis.readthedocs.io) draws examples until one fails, then makes that one smaller and
# smaller. What you get is not "test 173 failed" but the smallest picture that shows the bug.

# %%
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import fastinstance
from fastinstance import functional
from fastinstance.testing import PROPERTIES, Scene, assert_close, check_loss, scenes

torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.titlesize": 10, "image.interpolation": "nearest"})
FOUND, MISSED, FALSE = "#009E73", "#0072B2", "#D55E00"
TINY = os.environ.get("FASTINSTANCE_NOTEBOOKS") == "tiny"  # a few examples only: shows that everything runs
EXAMPLES, DIMS = (3, (2,)) if TINY else (30, (2, 3))

# %% [markdown]
# ## 1. A loss that is right
#
# Here is a soft Dice loss as many people write it: logits in, one Dice per image, the mean over the batch.


# %%
def my_dice(input, target):
    p = input.sigmoid().flatten(1)
    y = target.flatten(1)
    overlap, size = (p * y).sum(1), p.sum(1) + y.sum(1)
    return (1 - (2 * overlap + 1e-5) / (size + 1e-5)).mean()


start = time.perf_counter()
check_loss(my_dice, examples=EXAMPLES, dims=DIMS)
print(f"{len(PROPERTIES)} properties hold ({time.perf_counter() - start:.1f} s): {', '.join(PROPERTIES)}")

# %% [markdown]
# The losses of this library pass as well. Where a gradient is defined otherwise than as the derivative of the value
# (the false rates count; counting has no derivative), say so with `straight_through=True`.

# %%
check_loss(fastinstance.BlobLoss(sigmoid=True), examples=EXAMPLES, dims=DIMS)
check_loss(fastinstance.FalseLoss(sigmoid=True), straight_through=True, examples=EXAMPLES, dims=DIMS)
print("BlobLoss and FalseLoss: no property fails")

# %% [markdown]
# ## 2. Five bugs that people make
#
# Each variant below looks harmless, and each would survive a test on one random image. `check_loss` names the property
# that is lost, in one sentence, with the smallest scene that shows it: the target on the left, the logits on the right.


# %%
def not_contiguous(input, target):
    """`view` works until somebody trains with channels_last."""
    p, y = input.sigmoid().view(len(input), -1), target.view(len(input), -1)
    return (1 - (2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)).mean()


def infinite_log(input, target):
    """In float32 the sigmoid of 20 is exactly 1, and log(1 - 1) is -inf."""
    p = input.sigmoid()
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


def frozen_denominator(input, target):
    """A `detach` too many: the value is right, the gradient is not."""
    p, y = input.sigmoid().flatten(1), target.flatten(1)
    return (1 - (2 * (p * y).sum(1) + 1e-5) / (p.detach().sum(1) + y.sum(1) + 1e-5)).mean()


def counted(input, target):
    """Dice of the mask, not of the probabilities: a fine metric, useless as a loss."""
    p, y = (input >= 0).float().flatten(1), target.flatten(1)
    return (1 - (2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)).mean() + 0 * input.sum()


def lopsided_margin(input, target):
    """Meant to forgive a margin of one pixel around a lesion; it forgives the right-hand side only."""
    y = target
    margin = y.roll(1, -1) * (1 - y)
    return my_dice(torch.where(margin > 0, -100.0, input), y)


for bug in (not_contiguous, infinite_log, frozen_denominator, counted, lopsided_margin):
    print(f"— {bug.__name__}: {bug.__doc__}")
    try:
        check_loss(bug, examples=max(EXAMPLES, 10), dims=(2,))
    except AssertionError as error:
        print(f"  {error}\n")
    else:
        raise RuntimeError(f"check_loss missed {bug.__name__}")

# %% [markdown]
# ## 3. What Hypothesis draws
#
# The scenes are made to be nasty: shapes down to a single pixel, empty and full planes, touching and nested objects,
# spirals, checkerboards, one-pixel specks, logits of exactly 0 and of ±80, every dtype and memory layout. Here are
# some, with the size of the image above each.


# %%
def collect(count, **options):
    """Scenes as a test would get them."""
    drawn = []

    @settings(max_examples=count, database=None, derandomize=True, phases=[Phase.generate], verbosity=Verbosity.quiet)
    @given(scenes(**options))
    def run(scene):
        drawn.append(scene)

    run()
    return drawn


OUTCOMES = ListedColormap(["#F2F2F2", FOUND, MISSED, FALSE])


def show(axes, scene, title):
    """Pixels of the first plane: in both masks, in the target only, predicted only."""
    y, q = scene.target[0, 0] != 0, scene.input[0, 0] >= 0
    axes.imshow(np.select([y & q, y & ~q, ~y & q], [1, 2, 3], 0), cmap=OUTCOMES, vmin=0, vmax=3)
    height, width = y.shape
    axes.set_xticks(np.arange(width + 1) - 0.5, [])
    axes.set_yticks(np.arange(height + 1) - 0.5, [])
    axes.grid(color="white", linewidth=0.8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)


def legend(figure):
    names = (("target and predicted", FOUND), ("target only", MISSED), ("predicted only", FALSE))
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in names],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )


many = collect(30 if TINY else 400, dims=(2,), max_side=9)
sizes = sorted((scene for scene in many if min(scene.input.shape[2:]) >= 4), key=lambda scene: -scene.input.numel())
step = max(len(sizes) // 16, 1)
figure, axes = plt.subplots(2, 8, figsize=(11, 3.6), layout="constrained")
for panel, scene in zip(axes.flat, sizes[::step], strict=False):
    show(panel, scene, "{} × {}".format(*scene.input.shape[2:]))
legend(figure)
plt.show()

# %%
truths = [int(fastinstance.label(scene.target)[1][0, 0]) for scene in many]
guesses = [int(fastinstance.label(scene.input >= 0)[1][0, 0]) for scene in many]
figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
bins = np.arange(0, max(truths + guesses) + 2) - 0.5
for panel, numbers, colour, what in ((axes[0], truths, MISSED, "true"), (axes[1], guesses, FALSE, "predicted")):
    panel.hist(numbers, bins=bins, color=colour)
    panel.set(xlabel=f"{what} instances in the first plane", ylabel="scenes")
largest = [scene.input.abs().max().item() for scene in many]
axes[2].hist(np.array(largest) + 1e-3, bins=np.logspace(-1, 2, 25), color="#666666")
axes[2].set(xscale="log", xlabel="largest |logit|", ylabel="scenes")
for panel in axes:
    panel.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 4. A planted bug, found and shrunk
#
# Now a property of your own. Say that you write the missed-lesion rate with a labelling of your own, on tensors only:
# every pixel takes the largest number among its neighbours until nothing changes. The number of different numbers is
# the number of lesions.
#
# There is a bug in it. Can you see it?


# %%
def my_labels(mask):
    """Connected components of `mask` [B, C, H, W], 8-connectivity."""
    labels = (torch.arange(mask.numel()).view(mask.shape) + 1) * mask
    while True:
        padded = torch.nn.functional.pad(labels, (1, 1, 1, 1))
        around = [padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]]
        grown = torch.stack([labels, *around]).amax(0) * mask
        if torch.equal(grown, labels):
            return labels
        labels = grown


def my_missed_rate(input, target):
    """The share of true lesions without a predicted pixel, mean over the planes."""
    labels, predicted = my_labels(target != 0), input >= 0
    rates = []
    for plane, hit in zip(labels.flatten(0, 1), predicted.flatten(0, 1), strict=True):
        lesions, found = (set(values.unique().tolist()) - {0} for values in (plane, plane * hit))
        rates.append(1 - len(found) / len(lesions) if lesions else 0.0)
    return torch.tensor(rates).mean()


# %% [markdown]
# First the test that most of us would write: a few lesions, some found. It passes.

# %%
target = torch.zeros(1, 1, 64, 64)
for row, column in ((5, 5), (12, 40), (30, 20), (45, 50)):
    target[..., row : row + 6, column : column + 8] = 1
input = torch.where(torch.arange(64)[:, None] < 32, 3.0, -3.0) * target - 0.5
assert my_missed_rate(input, target) == 0.25
print("4 lesions, 3 found: the rate is 0.25, as it should be")

# %% [markdown]
# Then the property: on *every* scene it must equal `false_gt` of this library (or of `fastinstance.reference`, the
# paper written out as slow loops). We keep every scene that fails, to watch Hypothesis at work.

# %%
failures = []


@settings(
    max_examples=100 if TINY else 200,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(scenes(dims=(2,), max_batch=1, channels=(1, 1), dtypes=(torch.float32,), layouts=("contiguous",)))
def test_missed_rate(scene: Scene) -> None:
    expected = functional.instance_terms(scene.input, scene.target, sigmoid=True).false_gt
    try:
        assert_close(my_missed_rate(scene.input, scene.target), expected, name="missed rate")
    except AssertionError:
        failures.append(scene)
        raise


try:
    test_missed_rate()
except AssertionError as error:
    print(error, *getattr(error, "__notes__", ()), sep="\n")
else:
    raise RuntimeError("Hypothesis found no bug")

# %% [markdown]
# The bug is now plain to see: two true pixels that touch at a corner, one of them found. With 8-connectivity they are
# one lesion, and it is found. `my_labels` looks at the four direct neighbours only, sees two lesions, and reports one
# of them missed. Rectangles do not touch at corners: that is why the hand-made test passed.
#
# Below: some of the scenes that failed on the way, and how they shrank.

# %%
marked = [int(((scene.target != 0) | (scene.input >= 0)).sum()) for scene in failures]
pixels = [scene.input.numel() for scene in failures]
size = np.array(marked) + np.array(pixels)
records = [i for i, value in enumerate(size) if i == 0 or value < size[:i].min()]
chosen = sorted({records[round(i)] for i in np.linspace(0, len(records) - 1, 5)})
figure = plt.figure(figsize=(11, 4.6), layout="constrained")
pictures, curve = figure.subfigures(2, 1, height_ratios=[1.15, 1])
for panel, i in zip(pictures.subplots(1, len(chosen)), chosen, strict=True):
    show(panel, failures[i], f"failure {i + 1}")
legend(pictures)
axes = curve.subplots()
order = np.arange(1, len(failures) + 1)
axes.step(order, pixels, where="mid", color="#666666", label="in the image")
axes.step(order, marked, where="mid", color="#CC79A7", linestyle="--", label="true or predicted")
axes.plot(order[chosen], np.array(pixels)[chosen], "o", color="black", label="drawn above")
axes.set(xlabel="failing scene, in the order of the search", ylabel="pixels", ylim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
plt.show()

# %% [markdown]
# ## 5. The repair
#
# Four more neighbours, and the same test is silent.


# %%
def my_labels(mask):  # noqa: F811
    """Connected components of `mask` [B, C, H, W], 8-connectivity."""
    labels = (torch.arange(mask.numel()).view(mask.shape) + 1.0) * mask
    while True:
        grown = torch.nn.functional.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(grown, labels):
            return labels
        labels = grown


failures.clear()
test_missed_rate()
print(f"the same test again: {len(failures)} failures")

# %% [markdown]
# In a test suite you would keep the `@settings` out, or in a profile: Hypothesis remembers failing scenes in a folder
# and tries them first the next time. `scenes()` also draws 3D volumes, several channels, annotated ids that touch
# (`labels=True`), partial annotation (`valid=True`) and anisotropic voxels (`spacing=True`).
