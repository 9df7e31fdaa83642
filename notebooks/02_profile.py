# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where the time goes
#
# What does an instance loss cost, and what is it doing all that time? This notebook asks five questions, in the order
# in which one should ask them:
#
# 1. How long does a step take, beside a plain pixel loss?
# 2. Which stage takes it: labelling, sums, terms, backward?
# 3. Does it grow with the number of instances?
# 4. How far is it from what the memory allows (roofline)?
# 5. Which operators, or kernels, and what happens *between* them (launch gaps, CUDA graph)?
#
# It runs on a CPU and on a GPU, and takes the GPU if there is one. The parts that need one say so and are skipped
# otherwise. The figures are those of the machine named below; run it on yours.

# %%
import os
import platform
import statistics
import time
from collections import Counter

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from monai.losses.dice import GeneralizedDiceFocalLoss as MonaiGDF
from monai.networks.nets.unet import UNet
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import fastinstance
from fastinstance import reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TINY = os.environ.get("FASTINSTANCE_NOTEBOOKS") == "tiny"  # small and few: shows that everything runs
PLANES, SIDE, REPEATS = (2, 64, 3) if TINY else (48, 256, 15)
torch.set_num_threads(1)  # one thread can be compared with itself, on a machine that does other things too
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False})
plt.rcParams["axes.spines.right"] = False
GREEN, BLUE, RED, GREY, ORANGE, PINK = "#009E73", "#0072B2", "#D55E00", "#777777", "#E69F00", "#CC79A7"


def processor():
    """The model of the CPU, where the system tells."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


print(torch.cuda.get_device_name() if GPU else f"{processor()}, 1 thread")
print(f"torch {torch.__version__}, python {platform.python_version()}")

# %% [markdown]
# ## The batch
#
# The paper trains on two subjects of 24 slices of 256 × 256: 48 planes. Each of ours has about 15 true lesions and 20
# predicted ones, discs of 2 to 7 pixels, most of them found.


# %%
def discs(planes, side, true, predicted, radius, seed=0):
    """Logits and target [planes, 1, side, side]; four of five lesions are predicted, a pixel aside."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    target, guess = np.zeros((2, planes, side, side), bool)

    def draw(mask, row, column, r):
        mask |= (y - row) ** 2 + (x - column) ** 2 <= r**2

    for plane in range(planes):
        for i in range(max(true, predicted)):
            (row, column), r = rng.uniform(0, side, 2), rng.uniform(*radius)
            if i < true:
                draw(target[plane], row, column, r)
            if i < 0.8 * true:
                draw(guess[plane], *rng.normal((row, column), 1), r)
            elif i < predicted:
                draw(guess[plane], *rng.uniform(0, side, 2), r)
    size = np.abs(rng.normal(np.where(guess, 2, 4), 0.6)).clip(0.1)
    tensors = (np.where(guess, size, -size), target)
    return [torch.from_numpy(array.astype(np.float32))[:, None].to(DEVICE) for array in tensors]


logits, target = discs(PLANES, SIDE, 15, 20, (2, 7))
true, predicted = (int(fastinstance.label(mask)[1].sum()) for mask in (target, logits >= 0))
print(f"{logits.numel() / 1e6:.1f} million pixels, {true} true and {predicted} predicted instances")

# %% [markdown]
# ## 1. How long is a step?
#
# A step is forward and backward, to the gradient of the logits, both labellings included. The runs take turns, so that
# a busy moment of the machine hits none of them alone; the bar is the median, the line the quartiles. On a CPU we take
# the time that the processor spent on us, which other programs disturb little; on a GPU the time until it is done.

# %%
clock = time.perf_counter if GPU else time.process_time


def wait():
    if GPU:
        torch.cuda.synchronize()


def measure(runs, repeats=REPEATS):
    """{name: function} -> {name: milliseconds of each repetition}, in turns."""
    for run in runs.values():
        run()
        run()
    samples = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wait()
            start = clock()
            run()
            wait()
            samples[name].append(1e3 * (clock() - start))
    return samples


def step_of(loss, logits, target):
    """A training step of the loss alone."""
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss(leaf, target).backward()

    return step


all_terms = fastinstance.InstanceLoss(
    seg=1, instance_gt=1, instance_pred=1, center=1, false_gt=1, false_pred=1, proximity=0.1, sigmoid=True
)
losses = {
    "MONAI GDF": MonaiGDF(sigmoid=True),
    "GDF": fastinstance.GeneralizedDiceFocalLoss(sigmoid=True),
    "BlobLoss": fastinstance.BlobLoss(sigmoid=True),
    "ICILoss": fastinstance.ICILoss(sigmoid=True),
    "FalseLoss": fastinstance.FalseLoss(sigmoid=True),
    "ProximityLoss": fastinstance.ProximityLoss(sigmoid=True),
    "all seven terms": all_terms,
}
steps = {name: step_of(loss, logits, target) for name, loss in losses.items()}
samples = measure(steps)
milliseconds = {name: statistics.median(values) for name, values in samples.items()}


def bars(axes, samples, colours):
    """Horizontal bars: medians with quartiles, the first on top."""
    middle = [statistics.median(values) for values in samples.values()]
    low, high = np.percentile(list(samples.values()), [25, 75], axis=1)
    axes.barh(list(samples), middle, color=colours, xerr=[middle - low, high - middle], error_kw={"ecolor": "black"})
    axes.invert_yaxis()
    for y, (value, end) in enumerate(zip(middle, high, strict=True)):
        axes.text(end, y, f"  {value:.3g}", va="center")
    axes.margins(x=0.1)


figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
bars(axes, samples, [GREY, *[GREEN] * (len(samples) - 1)])
axes.set(xlabel="milliseconds a step", title=f"{PLANES} × {SIDE}², forward + backward; grey: the pixel loss of MONAI")
plt.show()

# %% [markdown]
# All terms share one labelling and one pass over the pixels, so seven terms cost little more than one. The losses that
# need no instances skip both.
#
# ## 2. Which stage?
#
# Stages are measured by leaving them out: labelling by itself, a forward pass, a whole step. With the ids of the ground
# truth computed once beforehand (`target_labels=`, for example in the data loader) one labelling is gone; where
# labelling is quick, as with sparse lesions on a CPU, that saves little or nothing.

# %%
ids, _ = fastinstance.label(target)
leaf = logits.clone().requires_grad_()
stages = measure(
    {
        "label the truth": lambda: fastinstance.label(target),
        "label the prediction": lambda: fastinstance.label(logits >= 0),
        "forward": lambda: all_terms(leaf, target),
        "step": steps["all seven terms"],
        "step, ids given": step_of(lambda x, y: all_terms(x, y, target_labels=ids), logits, target),
    }
)
stages = {name: statistics.median(values) for name, values in stages.items()}
labels = stages["label the truth"], stages["label the prediction"]
parts = {
    "label the truth": labels[0],
    "label the prediction": labels[1],
    "sums and terms": max(stages["forward"] - sum(labels), 0),
    "backward": max(stages["step"] - stages["forward"], 0),
}

figure, axes = plt.subplots(figsize=(9, 1.9), layout="constrained")
start = 0
for (name, value), colour in zip(parts.items(), (BLUE, RED, GREEN, ORANGE), strict=True):
    axes.barh("one step", value, left=start, color=colour, label=f"{name}, {value:.3g} ms", edgecolor="white")
    start += value
axes.set(xlabel="milliseconds")
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=9)
plt.show()
print(f"step {stages['step']:.3g} ms; with the ids of the ground truth given {stages['step, ids given']:.3g} ms")

# %% [markdown]
# ## 3. Many instances
#
# The usual implementation loops over instances and builds images for each: its time is instances × pixels. Here the
# same foreground is cut into ever more pieces. The loop below is `fastinstance.reference`, which is slow on purpose,
# and is only asked while it is bearable.


# %%
def squares(planes, side, size):
    """As many squares of `size` pixels as keep the foreground at about 3 %; the prediction is one pixel aside."""
    number = round((0.03**0.5) * side / size)
    target = torch.zeros(planes, 1, side, side)
    for row in range(number):
        for column in range(number):
            top, left = (i * side // number + 2 for i in (row, column))
            target[..., top : top + size, left : left + size] = 1
    guess = target.roll(max(size // 3, 0), -1)
    return [image.to(DEVICE) for image in (6 * guess - 3, target)]


planes = 1 if TINY else 8
sizes = (8, 3) if TINY else (44, 22, 11, 5, 3, 2, 1)
instances, growth = [], {"MONAI GDF": [], "all seven terms": [], "loop over instances": []}
for size in sizes:
    x, y = squares(planes, SIDE, size)
    instances.append(int(fastinstance.label(y)[1].sum()))
    runs = {name: step_of(losses[name], x, y) for name in ("MONAI GDF", "all seven terms")}
    if instances[-1] <= (20 if TINY else 700):
        loop = step_of(lambda x, y: sum(reference.instance_terms(x, y, sigmoid=True)), x.cpu(), y.cpu())
        start = clock()
        loop()
        growth["loop over instances"].append(1e3 * (clock() - start))
    for name, values in measure(runs, max(REPEATS // 2, 2)).items():
        growth[name].append(statistics.median(values))

figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
styles = {"MONAI GDF": (GREY, "s--"), "all seven terms": (GREEN, "o-"), "loop over instances": (RED, "^-")}
for name, values in growth.items():
    colour, style = styles[name]
    axes.loglog(instances[: len(values)], values, style, color=colour, label=name)
axes.set(xlabel="true instances in the batch, and as many predicted", ylabel="milliseconds a step")
axes.set_title(f"{planes} × {SIDE}², 3 % foreground" + (", the loop on the CPU" if GPU else ""))
axes.grid(which="major", color="#DDDDDD")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. How far from the roof?
#
# A roofline has two limits: bytes (measured here with a large copy) and arithmetic (a large matrix product, or the
# convolution below if it is faster). How many operations a kernel does for each byte it must move decides which limit
# it meets first. Losses do little arithmetic and live on the left, under the slope or near its end. A 3 × 3 convolution
# of a U-Net, for comparison, lives on the right.
#
# Bytes are the compulsory ones: read logits and target, write the gradient, 12 bytes a pixel for float32. Operations
# are counted by hand for the losses, some 40 a pixel for a sigmoid, a logarithm, the sums and their derivative, and by
# torch for the convolution. A factor of two in this count moves a point a little sideways; the distance to the roof is
# what matters.

# %%
big = torch.ones(1 << (18 if TINY else 26 if GPU else 24), device=DEVICE)
copy = torch.empty_like(big)
matrix = torch.randn((2 * [128 if TINY else 2048 if not GPU else 8192]), device=DEVICE)
channels = 8 if TINY else 32
features = torch.randn(2 if TINY else 8, channels, SIDE, SIDE, device=DEVICE)
convolution = torch.nn.Conv2d(channels, channels, 3, padding=1, device=DEVICE)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    convolution(features)


def convolve():
    with torch.no_grad():
        convolution(features)


roofs = {
    name: min(values)
    for name, values in measure(
        {"copy": lambda: copy.copy_(big), "product": lambda: matrix @ matrix, "3 × 3 convolution": convolve}, 5
    ).items()
}
bandwidth = 2 * big.numel() * 4 / roofs["copy"] / 1e6  # GB/s
rates = 2 * len(matrix) ** 3 / roofs["product"], counter.get_total_flops() / roofs["3 × 3 convolution"]
peak = max(rates) / 1e6  # GFLOP/s
points = {  # name -> bytes, operations, milliseconds
    "3 × 3 convolution": (2 * 4 * features.numel(), counter.get_total_flops(), roofs["3 × 3 convolution"]),
    **{
        name: (12 * logits.numel(), 40 * logits.numel(), milliseconds[name])
        for name in ("MONAI GDF", "GDF", "all seven terms")
    },
}

figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
intensity = np.logspace(-1, 3.5, 200)
axes.loglog(intensity, np.minimum(intensity * bandwidth, peak), color="black")
place = (peak / bandwidth) ** 0.5 / 3
axes.text(place, place * bandwidth * 1.5, f"copy: {bandwidth:.3g} GB/s", ha="right")
axes.text(10**3.4, peak * 1.2, f"arithmetic: {peak:.3g} GFLOP/s", ha="right")
print(f"{'':<20}{'least bytes':>12}{'ms':>9}{'floor, ms':>11}{'of the roof':>13}")
for (name, (size, operations, taken)), colour, marker in zip(
    points.items(), (BLUE, GREY, ORANGE, GREEN), "Ds^o", strict=True
):
    x, achieved = operations / size, operations / taken / 1e6
    axes.plot(x, achieved, marker, color=colour, label=name, markersize=9)
    floor = max(size / bandwidth, operations / peak) / 1e6
    axes.plot([x, x], [achieved, operations / floor / 1e6], ":", color=colour)
    print(f"{name:<20}{size / 1e6:>9.1f} MB{taken:>9.3g}{floor:>11.3g}{floor / taken:>13.1%}")
axes.set(xlabel="operations a byte", ylabel="GFLOP/s", title="dotted: what is left up to the roof")
axes.grid(which="major", color="#DDDDDD")
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## 5. Operators and kernels
#
# `torch.profiler` records every operator of a step, and on a GPU every kernel. First the sums: what takes most.

# %%
activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
SPANS = ("forward", "backward")


def profiled_step():
    """Events of a step, and how long it took, in ms."""
    leaf = logits.clone().requires_grad_()
    wait()
    start = time.perf_counter()
    with profile(activities=activities) as profiled:
        with record_function("forward"):
            value = all_terms(leaf, target)
        with record_function("backward"):
            value.backward()
        wait()
    return 1e3 * (time.perf_counter() - start), list(profiled.events())


# The quickest of a few is the one that was disturbed least; the first of a process can lack events.
profiled_step()
_, events = min((profiled_step() for _ in range(2 if TINY else 25)), key=lambda pair: pair[0])


def on_gpu(event):
    return event.device_type == torch.autograd.DeviceType.CUDA


def milliseconds_of(event):
    return event.time_range.elapsed_us() / 1e3


calls, total = Counter(), Counter()
for event in events:
    if event.name not in SPANS and on_gpu(event) == GPU:
        calls[event.name] += 1
        total[event.name] += milliseconds_of(event) if GPU else event.self_cpu_time_total / 1e3

everything = sum(total.values())
print(f"{'kernel' if GPU else 'operator':<44}{'calls':>7}{'ms':>9}{'share':>8}")
for name, taken in total.most_common(12):
    print(f"{name[:42]:<44}{calls[name]:>7}{taken:>9.3f}{taken / everything:>8.1%}")
print(f"{f'{len(total)} in all':<44}{sum(calls.values()):>7}{everything:>9.3f}")

# %% [markdown]
# ## 6. Gaps
#
# Then the timeline: when is the machine at work, and when does it wait for the next operator?
#
# On a GPU the gaps between kernels are the price of launching them one by one: with a step of some hundred
# microseconds the host can hardly keep up. On a CPU the gaps are Python, and work that torch does not know as an
# operator: numpy finds the foreground pixels, and dense masks go to the labeller cc3d.


# %%
def merged(events):
    """Overlapping events as one list of (start, end)."""
    spans = []
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    return np.array(spans).reshape(-1, 2)


def is_top(event):
    """An operator that no other operator called; calls into the driver, which may only wait, are none."""
    top = event.cpu_parent is None or event.cpu_parent.name in SPANS
    return top and not on_gpu(event) and event.name not in SPANS and not event.name.startswith("cuda")


lines = {"operators (CPU)": merged([event for event in events if is_top(event)])}
if GPU:
    lines["kernels (GPU)"] = merged([event for event in events if on_gpu(event) and event.name not in SPANS])
marks = {event.name: event.time_range for event in events if event.name in SPANS and not on_gpu(event)}
zero = min(span.start for span in marks.values())

figure, (axes, gaps_axes) = plt.subplots(
    1, 2, figsize=(11, 1.6 + 0.5 * len(lines)), layout="constrained", width_ratios=(3, 1.2)
)
for row, ((name, spans), colour) in enumerate(zip(lines.items(), (GREEN, BLUE), strict=False)):
    axes.broken_barh([((a - zero) / 1e3, (b - a) / 1e3) for a, b in spans], (row - 0.4, 0.8), color=colour)
    gaps = (spans[1:, 0] - spans[:-1, 1]) / 1e3
    busy, whole = (spans[:, 1] - spans[:, 0]).sum() / 1e3, (spans[-1, 1] - spans[0, 0]) / 1e3
    edges = np.logspace(-4, 2, 31)
    gaps_axes.hist(gaps, bins=edges, weights=gaps, color=colour, alpha=0.7, label=name)
    print(
        f"{name}: busy {busy:.3g} of {whole:.3g} ms ({busy / whole:.0%}); {len(gaps)} gaps, longest {gaps.max():.3g} ms"
    )
for name, span in marks.items():
    begin, end = (span.start - zero) / 1e3, (span.end - zero) / 1e3
    axes.axvspan(begin, end, color=ORANGE if name == "forward" else PINK, alpha=0.18, zorder=0)
axes.set_yticks(range(len(lines)), list(lines))
axes.set(xlabel="milliseconds", ylim=(-0.6, len(lines) - 0.4))
axes.legend(
    handles=[Patch(color=ORANGE, alpha=0.3, label="forward"), Patch(color=PINK, alpha=0.3, label="backward")],
    loc="lower center",
    bbox_to_anchor=(0.5, 1),
    ncols=2,
    frameon=False,
)
gaps_axes.set(xscale="log", xlabel="length of a gap, ms", ylabel="ms in all")
plt.show()

# %% [markdown]
# ## 7. Graph versus eager
#
# `make_graphed(loss, sample_input, sample_target)` records the kernels once and replays them with a single launch: the
# gaps are gone. It works because no kernel here waits for the host or depends on the data.

# %%
if GPU:
    loss = fastinstance.make_graphed(all_terms, logits.clone().requires_grad_(), target)
    both = {"eager": steps["all seven terms"], "graph": step_of(loss, logits, target)}
    samples = measure(both, 4 * REPEATS)
    figure, axes = plt.subplots(figsize=(9, 1.6), layout="constrained")
    bars(axes, samples, [ORANGE, GREEN])
    axes.set(xlabel="milliseconds a step")
    plt.show()
else:
    print("There is no GPU here, so there are no launches to save: this part is skipped.")

# %% [markdown]
# ## 8. In a training
#
# Last, the only share that counts: that of a whole training step, with a network that is small for today (16 to 64
# channels). A larger network makes the share smaller still.

# %%
count = 2 if TINY else 8
network = UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 32, 64), strides=(2, 2)).to(DEVICE)
images, masks = logits[:count], target[:count]


def train(loss):
    def step():
        network.zero_grad()
        loss(network(images), masks).backward()

    return step


# An untrained network predicts noise: the loss is timed by itself, on the predictions of this notebook.
alone = measure({"loss": step_of(all_terms, images, masks), "network": train(lambda x, y: (x * y).mean())})
share = {name: statistics.median(values) for name, values in alone.items()}
print(f"{count} slices: network {share['network']:.3g} ms, all seven terms {share['loss']:.3g} ms,")
print(f"share of the loss {share['loss'] / sum(share.values()):.1%}")
