# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train on lesions, judge lesion by lesion
#
# The same small U-Net is trained with five losses on brain images with generated lesions, and judged as a doctor would:
# which lesions were found, which were missed, what was false, and how large were they? At the end two networks are
# joined into one by the size of the lesions (the volume ensemble of section 4.2 of Rachmadi, Byra and Skibbe, 2024).
#
# This is a lesson in how to do it, of a few minutes on a laptop: one seed, few subjects, a short training. It is
# **not** evidence that one loss is better than another. For that, take your data, several seeds and a validation set.

# %%
import copy
import math
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from monai.networks.nets.unet import UNet

import fastinstance
from fastinstance import InstanceMetrics, functional, instance_metrics, rank_methods, volume_ensemble
from fastinstance.overlay import paint
from fastinstance.study import brain

SETTINGS = {  # subjects to train and to test, slices of each, steps of warm-up and of each loss
    "tiny": (1, 1, 2, 2, 2),  # shows that everything runs
    "full": (10, 8, 12, 250, 200),
}
TRAIN, TEST, SLICES, WARM_UP, STEPS = SETTINGS[os.environ.get("FASTINSTANCE_NOTEBOOKS", "full")]
SEED, BATCH = 0, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # give it more on an idle machine
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False})
plt.rcParams["axes.spines.right"] = False
FOUND, MISSED, FALSE = "#009E73", "#0072B2", "#D55E00"

# %% [markdown]
# ## 1. The data
#
# `fastinstance.study.brain` bends a template brain differently for every subject and grows lesions in its white matter,
# so the true outlines are known. Slices are 3 mm thick with pixels of 1 mm: a voxel has 0.003 mL. We keep the middle of
# each slice, where the white matter is.

# %%
CROP = np.s_[..., 30:158, 24:136]


def subject(number):
    """Image and lesions of a subject, [1, slices, 128, 112]."""
    made = brain.generate((SEED, number), slices=SLICES)
    return [torch.from_numpy(np.ascontiguousarray(array[CROP]))[None] for array in (made.image, made.lesions)]


start = time.perf_counter()
images, lesions = (torch.stack(side) for side in zip(*map(subject, range(TRAIN + TEST)), strict=True))
print(f"{TRAIN} + {TEST} subjects of {SLICES} slices in {time.perf_counter() - start:.0f} s")

busiest = lesions[:, 0].sum((2, 3)).argmax(1)
figure, axes = plt.subplots(1, 4, figsize=(11, 3.6), layout="constrained", width_ratios=(1, 1, 1, 1.5))
for panel, i in zip(axes[:3], range(TRAIN + TEST), strict=False):
    z = busiest[i]
    panel.imshow(images[i, 0, z], cmap="gray", vmin=-2.5, vmax=3.5, origin="lower")
    panel.contour(lesions[i, 0, z], levels=[0.5], colors=[FOUND], linewidths=1)
    panel.set(title=f"subject {i + 1}, slice {z + 1}")
for panel in axes[:3]:
    panel.set_axis_off()
volumes = []
for mask in lesions:
    ids, _ = fastinstance.label(mask[None])
    volumes.append(torch.bincount(ids.flatten())[1:] * brain.VOXEL_ML)
volumes = torch.cat(volumes).numpy()
axes[3].hist(volumes, bins=np.geomspace(brain.VOXEL_ML / 2, 20, 30), color=MISSED)
axes[3].axvline(0.05, color="black", linestyle="--", linewidth=1)
axes[3].text(0.055, axes[3].get_ylim()[1] * 0.97, "0.05 mL", va="top")
axes[3].set(xscale="log", xlabel="volume of a lesion, mL", ylabel="lesions", title=f"{len(volumes)} lesions")
plt.show()

# %% [markdown]
# ## 2. Five losses, one warm-up
#
# All five start from the same network, trained on the pixel loss alone. That is fair, saves time, and for
# `ProximityLoss` it is a must: its term is the square of a difference of sums over all instances, and a network that
# has learnt nothing predicts thousands of them.
#
# Note the labels: `target_labels` are computed once for all slices and go along with the batches.

# %%
train_images, train_targets = (side[:TRAIN].flatten(0, 2)[:, None].float().to(DEVICE) for side in (images, lesions))
train_labels, _ = fastinstance.label(train_targets)
with_lesions = train_labels.flatten(1).any(1).nonzero().squeeze(1).cpu().numpy()
pixel_loss = fastinstance.GeneralizedDiceFocalLoss(sigmoid=True)
proximity = {}  # step -> value of the proximity term on a fixed batch
TOTAL = WARM_UP + STEPS


def train(network, optimizer, loss, steps, watch=None):
    """Train in place over a range of steps of one common schedule; the batches depend on the step alone."""
    network.train()
    for step in steps:
        rng = np.random.default_rng((SEED, step))
        share = (step + 1) / TOTAL
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * min(share, 0.98)))
        chosen = torch.from_numpy(rng.choice(with_lesions, min(BATCH, len(with_lesions)), replace=False)).to(DEVICE)
        batch = [side[chosen] for side in (train_images, train_targets, train_labels)]
        if rng.random() < 0.5:
            batch = [side.flip(-1) for side in batch]
        image, target, ids = batch
        optimizer.zero_grad()
        value = loss(network(image), target, target_labels=ids)
        value.backward()
        optimizer.step()
        if watch is not None and (step % 10 == 0 or step == WARM_UP - 1):
            watch[step] = watched(network)
    return value.item()


def watched(network):
    with torch.no_grad():
        first = torch.from_numpy(with_lesions[:BATCH]).to(DEVICE)
        terms = functional.instance_terms(network(train_images[first]), train_targets[first], sigmoid=True)
    return terms.proximity.item()


torch.manual_seed(SEED)
start = time.perf_counter()
network = UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 32, 64), strides=(2, 2)).to(DEVICE)
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
value = train(network, optimizer, pixel_loss, range(WARM_UP), proximity)
print(f"warm-up: {WARM_UP} steps in {time.perf_counter() - start:.0f} s, pixel loss {value:.3f}")

figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
axes.semilogy(list(proximity), np.maximum(list(proximity.values()), 1e-3), "o-", color=FALSE, markersize=4)
axes.set(xlabel="step of the warm-up on the pixel loss", ylabel="proximity term")
axes.set_title("why the proximity loss must wait: its value while the network learns")
plt.show()

# %%
losses = {
    "GDF": pixel_loss,
    "blob": fastinstance.BlobLoss(sigmoid=True),
    "ICI": fastinstance.ICILoss(sigmoid=True),
    "False": fastinstance.FalseLoss(sigmoid=True),
    "Proximity": fastinstance.ProximityLoss(sigmoid=True),
}
networks = {}
for name, loss in losses.items():
    start = time.perf_counter()
    networks[name], its_optimizer = copy.deepcopy((network, optimizer))
    value = train(networks[name], its_optimizer, loss, range(WARM_UP, TOTAL))
    print(f"{name:<10} {STEPS} steps in {time.perf_counter() - start:3.0f} s, loss {value:.3f}")
    if not math.isfinite(value):
        raise RuntimeError(f"{name} diverged")

# %% [markdown]
# ## 3. Judge
#
# `InstanceMetrics` takes one subject after the other, 3D masks `[B, C, D, H, W]` with their voxel size, and computes
# means over subjects with confidence intervals. With `by_volume=` it also counts by the size of the lesions.
#
# DSC counts pixels; PQ, SEN (share of lesions found), PPV (share of predictions that hit one) and F1 count lesions.

# %%
test_images, test_lesions = images[TRAIN:], lesions[TRAIN:]
EDGES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # mL


def predict(network):
    """Logits [subjects, 1, slices, y, x] of the test subjects."""
    network.eval()
    with torch.no_grad():
        parts = [network(volume.transpose(0, 1).to(DEVICE)).cpu().transpose(0, 1) for volume in test_images]
    return torch.stack(parts)


def judge(masks):
    """All metrics over the test subjects of masks [subjects, 1, slices, y, x]."""
    metrics = InstanceMetrics(spacing=brain.SPACING, min_size=2, by_volume=EDGES)
    for mask, truth in zip(masks, test_lesions, strict=True):
        metrics.update(mask[None], truth[None])
    return metrics.compute()


logits = {name: predict(trained) for name, trained in networks.items()}
masks = {name: values >= 0 for name, values in logits.items()}
masks["ensemble"] = volume_ensemble(masks["False"], masks["GDF"], threshold_ml=0.05, spacing=brain.SPACING)
results = {name: judge(values) for name, values in masks.items()}


def show_table(results):
    columns = {"dsc": "DSC", "vol_diff_ml": "VD, mL", "pq": "PQ", "sen": "SEN", "ppv": "PPV", "f1": "F1"}
    print(f"{'':<10}" + "".join(f"{title:>9}" for title in columns.values()) + f"{'F1, 95 % CI':>17}")
    for name, result in results.items():
        cells = "".join(f"{result[key].item():>9.3f}" for key in columns)
        print(f"{name:<10}{cells}{result['f1_low'].item():>9.3f} to {result['f1_high'].item():.3f}")


show_table(results)

# %% [markdown]
# The **ensemble** takes lesions below 0.05 mL from the network trained with the False loss and larger ones from the one
# trained with GDF: `volume_ensemble(small, large, threshold_ml=0.05, spacing=...)`. A single line, no training.
#
# The intervals are wide and overlap: eight subjects are few. Whether a difference is real, paired tests on more of them
# can tell.
#
# The paper ranks methods over eight metrics: RA over all of them, RG over DSC and volume difference, RI over the five
# instance-level ones. Lower is better.

# %%
keys = {"pq": "pq", "dsc": "dsc", "vol_diff": "vol_diff_ml", **{key: key for key in ("fdr", "fnr", "ppv", "sen", "f1")}}
ranks = rank_methods({name: {to: r[key].item() for to, key in keys.items()} for name, r in results.items()})
print(f"{'':<10}" + "".join(f"{key:>9}" for key in ("RA", "RG", "RI")))
for name, rank in ranks.items():
    print(f"{name:<10}" + "".join(f"{rank[key]:>9.1f}" for key in ("RA", "RG", "RI")))

# %% [markdown]
# ## 4. By size
#
# A mean over all lesions hides where a loss earns or loses. True lesions are counted in the group of their own volume,
# false predictions in the group of theirs.

# %%
names = InstanceMetrics(by_volume=EDGES).volume_names
place = np.arange(len(names))
figure, axes = plt.subplots(2, 3, figsize=(11, 5.2), layout="constrained", sharex=True, sharey=True)
for panel, (name, result) in zip(axes.flat, results.items(), strict=True):
    found, missed, false = (result[f"volume_{key}"].numpy() for key in ("n_found", "n_missed", "n_false"))
    panel.bar(place - 0.2, found, 0.4, color=FOUND)
    panel.bar(place - 0.2, missed, 0.4, bottom=found, color=MISSED)
    panel.bar(place + 0.2, false, 0.4, color=FALSE, hatch="///", edgecolor="white", linewidth=0)
    panel.set_title(f"{name}: {found.sum()} found, {missed.sum()} missed, {false.sum()} false")
    panel.set_xticks(place, names, rotation=45, ha="right")
for panel in axes[-1]:
    panel.set_xlabel("volume, mL")
for panel in axes[:, 0]:
    panel.set_ylabel("instances")
figure.legend(
    handles=[
        Patch(color=FOUND, label="found"),
        Patch(color=MISSED, label="missed"),
        Patch(facecolor=FALSE, hatch="///", edgecolor="white", label="false"),
    ],
    loc="outside lower center",
    ncols=3,
    frameon=False,
)
plt.show()

# %%
STYLES = {
    "GDF": ("#777777", "s-"),
    "blob": ("#E69F00", "^-"),
    "ICI": ("#CC79A7", "v-"),
    "False": ("#56B4E9", "D-"),
    "Proximity": ("#8C6D31", "P-"),
    "ensemble": ("black", "o--"),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharex=True)
for panel, (key, title) in zip(
    axes, {"sen": "sensitivity", "ppv": "precision", "dsc": "Dice of a lesion"}.items(), strict=True
):
    for name, result in results.items():
        colour, style = STYLES[name]
        count = result["volume_n_pred" if key == "ppv" else "volume_n_target"].numpy()
        values = np.where(count > 0, result[f"volume_{key}"].numpy(), np.nan)  # no group of nothing
        panel.plot(place, values, style, color=colour, label=name, markersize=5, linewidth=1.3)
    panel.set(title=title, xlabel="volume, mL", ylim=(0, 1.03))
    panel.set_xticks(place, names, rotation=45, ha="right")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
plt.show()

# %% [markdown]
# Nearly all that differs lies below 0.2 mL; large lesions are found by every network. In our run the ICI and False
# losses find many more of the small ones, and add false ones of the same size.
#
# Look at the ensemble between 0.05 and 0.2 mL, where it may fall below *both* of its members. A lesion that the False
# network draws larger than 0.05 mL and the GDF network smaller is taken from neither. Choose the threshold where few
# lesions lie, and check it on a validation set.
#
# ## 5. At equal precision
#
# A network that predicts more finds more, and a lower threshold has the same effect. So compare curves, not points:
# sensitivity against precision for all thresholds, means over the subjects. The filled marker is threshold 0.5.

# %%
thresholds = (0.4, 0.5) if STEPS < 10 else (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
for name, values in logits.items():
    curve = []
    for threshold in thresholds:
        mask = values >= math.log(threshold / (1 - threshold))
        found = instance_metrics(mask, test_lesions, spacing=brain.SPACING, min_size=2)
        curve.append([found["ppv"].mean().item(), found["sen"].mean().item()])
    colour, style = STYLES[name]
    axes.plot(*np.transpose(curve), style, color=colour, label=name, markerfacecolor="none", markersize=5)
    axes.plot(*curve[thresholds.index(0.5)], style[0], color=colour, markersize=9)
ensemble = results["ensemble"]
axes.plot(ensemble["ppv"], ensemble["sen"], "o", color="black", markersize=9, label="ensemble")
axes.set(xlabel="precision (PPV)", ylabel="sensitivity (SEN)")
axes.grid(color="#EEEEEE")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# A curve that lies above another one finds more at *every* price. Two filled markers on the same curve differ only in
# how keen they are, and that you could have had with another threshold.
#
# ## 6. Look at it
#
# Numbers first, then eyes. One slice of the test subject with most lesions; the counts are those of the whole subject.

# %%
tones = {
    "found": "#1FCC99",
    "false": "#FF7A1A",
    "missed": "#4FB3FF",
}  # brighter, on dark images; as `paint` numbers them
chosen = int(instance_metrics(test_lesions, test_lesions)["n_target"].argmax())
z = int(test_lesions[chosen, 0].sum((1, 2)).argmax())
grey = np.clip((test_images[chosen, 0].numpy() + 2.5) / 6, 0, 1)
figure, axes = plt.subplots(1, 4, figsize=(11, 3.9), layout="constrained")
axes[0].imshow(grey[z], cmap="gray", vmin=0, vmax=1, origin="lower")
axes[0].set_title(f"test subject {chosen + 1}, slice {z + 1}")
for panel, name in zip(axes[1:], ("GDF", "False", "ensemble"), strict=True):
    painted = paint(grey, masks[name][chosen, 0].numpy(), test_lesions[chosen, 0].numpy(), min_size=2)
    picture = np.repeat(0.8 * grey[z, ..., None], 3, axis=-1)
    for layer, tone in enumerate(tones.values(), start=1):
        picture[painted.layer[z] == layer] = to_rgb(tone)
    panel.imshow(picture, origin="lower")
    panel.set_title(f"{name}\n{painted.found} found, {painted.missed} missed, {painted.false} false")
for panel in axes:
    panel.set_axis_off()
figure.legend(
    handles=[Patch(color=tone, label=name) for name, tone in tones.items()],
    loc="outside lower center",
    ncols=3,
    frameon=False,
)
plt.show()
