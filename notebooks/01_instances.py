# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What an instance loss sees
#
# A Dice loss counts pixels. A doctor counts lesions. This notebook draws, on masks small enough to check by eye, what
# each term of the instance loss family looks at and where it pushes the prediction. It follows Figs. 1 and 3 to 7 of
# Rachmadi, Byra and Skibbe (2024); "Eq. k" is an equation of that paper.
#
# Every picture of a term is also a check: the value that we compute from the drawn pixels must be the one that
# `fastinstance` returns. If a picture were wrong, its cell would stop with an error.
#
# Colours, here and in the other notebooks: **green** found, **blue** missed, **red** false. The three tones are told
# apart with colour-blind eyes too.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

import fastinstance
from fastinstance import functional, reference

torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.titlesize": 10, "image.interpolation": "nearest"})
FOUND, MISSED, FALSE = "#009E73", "#0072B2", "#D55E00"
PARTLY = "#A6DCCB"  # pixels of a found lesion that are not predicted

# %%
HEIGHT, WIDTH = 44, 60
rows, columns = np.mgrid[:HEIGHT, :WIDTH]


def blob(row, column, pixels, stretch=1.0):
    """The `pixels` pixels nearest to a point: a disc (an ellipse, `stretch` times as wide) of exactly that area."""
    distance = (rows - row) ** 2 + ((columns - column) / stretch) ** 2
    mask = np.zeros(HEIGHT * WIDTH, bool)
    mask[np.argsort(distance.ravel(), kind="stable")[:pixels]] = True
    return mask.reshape(HEIGHT, WIDTH)


def batch(image):
    """A picture as a batch of one image and one channel, which is what a loss takes."""
    return torch.as_tensor(image)[None, None]


def ids(mask):
    """Instance ids of a mask: its connected components."""
    return fastinstance.label(batch(mask))[0][0, 0].numpy()


def paint(target, predicted):
    """Lesions and predictions by what became of them: an RGB picture, and the numbers found, missed and false."""
    t, q = ids(target), ids(predicted)
    found, hit = (np.setdiff1d(labels[target & predicted], 0) for labels in (t, q))
    picture = np.ones((*target.shape, 3)) * 0.96
    picture[target & ~np.isin(t, found)] = to_rgb(MISSED)
    picture[predicted & ~np.isin(q, hit)] = to_rgb(FALSE)
    picture[np.isin(t, found) & target] = to_rgb(PARTLY)
    picture[np.isin(q, hit) & predicted] = to_rgb(FOUND)
    return picture, (len(found), t.max() - len(found), q.max() - len(hit))


def show(axes, picture, title="", **options):
    axes.imshow(picture, **options)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title)


def legend(figure, *more):
    names = (("found", FOUND), ("found, not predicted", PARTLY), ("missed", MISSED), ("false", FALSE), *more)
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in names],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )


# %% [markdown]
# ## 1. The same Dice, three different predictions
#
# The target has one large lesion of 320 pixels and five small ones of 16. Three networks make one mistake each:
#
# - A misses all five small lesions: 80 pixels too few;
# - B loses the rim of the large lesion: also 80 pixels too few;
# - C finds everything and adds four false lesions: 100 pixels too many.
#
# With 400 true pixels all three have a Dice coefficient of exactly 8/9. A would lose a patient's five new lesions, and
# no pixel-counting score can tell.

# %%
large, small = (21, 19), [(7.5, 42.5), (13.5, 53.5), (24.5, 45.5), (37.5, 40.5), (37.5, 53.5)]
target = blob(*large, 320, 1.3)
for place in small:
    target |= blob(*place, 16)
false = np.zeros_like(target)
for place in [(5, 8), (5, 30), (39, 8), (30, 55)]:
    false |= blob(*place, 25)

predictions = {
    "A: misses the small ones": blob(*large, 320, 1.3),
    "B: loses the rim": (target & ~blob(*large, 320, 1.3)) | blob(*large, 240, 1.3),
    "C: adds false ones": target | false,
}


def dice(predicted, target):
    return 2 * (predicted & target).sum() / (predicted.sum() + target.sum())


figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
show(axes[0], ~target, "target: 6 lesions, 400 pixels", cmap="gray", vmin=-0.4)
for panel, (name, predicted) in zip(axes[1:], predictions.items(), strict=True):
    picture, (found, missed, wrong) = paint(target, predicted)
    show(panel, picture, f"{name}\nDice {dice(predicted, target):.4f}")
    panel.set_xlabel(f"{found} found, {missed} missed, {wrong} false")
    assert dice(predicted, target) == 8 / 9
legend(figure)
plt.show()

# %% [markdown]
# ### What the losses say
#
# `functional.instance_terms` returns all terms at once. The Dice loss sees no difference. The instance terms do:
#
# - `instance_gt` (Eq. 2) and `false_gt` (Eq. 5) ask about every *true* lesion, so A is the worst;
# - `instance_pred` (Eq. 3) and `false_pred` (Eq. 6) ask about every *predicted* one, so C is the worst;
# - `center` (Eq. 4) sees each lesion as one small box, whatever its size: A and C are both wrong, B is right;
# - `proximity` (Eqs. 7 to 10) is a squared difference of sums over both sides. It is not bounded: note its scale.

# %%
rows_of_terms = {}
for name, predicted in predictions.items():
    logits = batch(np.where(predicted, 8.0, -8.0))
    terms = functional.instance_terms(logits, batch(target), sigmoid=True, pixel_loss="dice")._asdict()
    terms["blob"] = functional.blob_terms(logits, batch(target), sigmoid=True, pixel_loss="dice").blob
    rows_of_terms[name[0]] = {term: value.item() for term, value in terms.items()}

figure, axes = plt.subplots(1, 8, figsize=(11, 2.3), layout="constrained")
for panel, term in zip(axes, rows_of_terms["A"], strict=True):
    values = [row[term] for row in rows_of_terms.values()]
    bars = panel.bar(list(rows_of_terms), values, color=[MISSED, PARTLY, FALSE], edgecolor="black", linewidth=0.6)
    panel.bar_label(bars, [f"{value:.2g}" if value > 1e-3 else "0" for value in values], fontsize=8)
    panel.set_title("seg (Dice)" if term == "seg" else term)
    panel.set_ylim(0, max(values) * 1.2)
    panel.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("value")
figure.supxlabel("prediction A, B or C; each term has its own scale", fontsize=10)
plt.show()

# %% [markdown]
# ## 2. What each term sees
#
# A second scene has one example of everything that can happen to a lesion:
#
# | true lesion | what became of it |
# |---|---|
# | 1 | found, but shifted |
# | 2 and 3 | merged: one prediction covers both |
# | 4 | split: two predictions cover parts of it |
# | 5 | missed |
#
# and there is one prediction without any lesion. The network's probabilities are soft: high in the middle of a
# prediction, low at its edge.

# %%
truth = blob(12, 13, 145) | blob(10, 38, 37) | blob(10, 51, 37) | blob(31, 14, 118, 2.2) | blob(31, 43, 25)
guess = blob(14, 14, 137) | blob(10, 44.5, 134, 2.6) | blob(31, 7, 37) | blob(31, 22, 37) | blob(36, 54, 37)
inside = torch.as_tensor(guess)
smooth = F.avg_pool2d(batch(inside).double(), 5, stride=1, padding=2, count_include_pad=False)[0, 0]
logits = torch.where(inside, 0.2 + 6 * (smooth - 0.5).clamp(min=0), 4 * smooth.clamp(max=0.9) - 4)
p = logits.sigmoid()
t, q = ids(truth), ids((logits >= 0).numpy())
assert (q > 0).tolist() == guess.tolist()


def number(axes, labels, colour, style="italic", weight="bold"):
    """Write the id on every instance."""
    for i in range(1, labels.max() + 1):
        where = np.argwhere(labels == i).mean(0)
        axes.text(*where[::-1], str(i), color=colour, ha="center", va="center", weight=weight, style=style)


def outline(axes, labels, colour, width=1.2, ids=None):
    for i in range(1, labels.max() + 1) if ids is None else ids:
        axes.contour(labels == i, levels=[0.5], colors=[colour], linewidths=width)


def show_probability(axes, values, title):
    return axes.imshow(values, cmap="gray_r", vmin=0, vmax=1), axes.set(xticks=[], yticks=[]), axes.set_title(title)


figure, axes = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
show(axes[0], ~truth, "ground truth, ids $n$", cmap="gray", vmin=-1)
number(axes[0], t, "black")
image = axes[1].imshow(p, cmap="gray_r", vmin=0, vmax=1)
axes[1].set(xticks=[], yticks=[])
axes[1].set_title("probability, ids $m$ of the components ≥ 0.5")
outline(axes[1], q, FALSE)
number(axes[1], q, "white")
figure.colorbar(image, ax=axes[1], shrink=0.75, label="p")
picture, counts = paint(truth, guess)
show(axes[2], picture, "{} found, {} missed, {} false".format(*counts))
legend(figure)
plt.show()

# %% [markdown]
# ### Instance terms (Eqs. 2 and 3) and blob loss
#
# Each true lesion $n$ gets an image of its own: the predictions that touch $n$, without what lies on other lesions
# (top row). Each prediction $m$ gets the lesions that it touches (middle row). The term is the mean of a pixel loss
# over these images, so a lesion of 25 pixels weighs as much as one of 150.
#
# Blob loss (bottom row) takes away only the other lesions. Every false positive therefore stays in the image of every
# lesion: look at the prediction in the lower right corner.
#
# The loop below is for the drawing. The library computes the same numbers from sums over ids, for all instances at
# once.


# %%
def dice_loss(prediction, mask):
    """The soft Dice loss of an image."""
    overlap, smooth = (prediction * mask).sum(), 1e-5
    return (1 - (2 * overlap + smooth) / (prediction.sum() + mask.sum() + smooth)).item()


def touching(labels, others, i):
    """Ids of `others` that share a pixel with instance i of `labels`."""
    return np.setdiff1d(others[labels == i], 0)


probability = p.numpy()
views = {"instance_gt (Eq. 2)": [], "instance_pred (Eq. 3)": [], "blob": []}
for n in range(1, t.max() + 1):
    mine, others = t == n, (t > 0) & (t != n)
    views["instance_gt (Eq. 2)"].append((np.isin(q, touching(t, q, n)) & ~others, mine))
    views["blob"].append((~others, mine))
for m in range(1, q.max() + 1):
    views["instance_pred (Eq. 3)"].append((q == m, np.isin(t, touching(q, t, m))))

figure, axes = plt.subplots(3, 5, figsize=(11, 5.6), layout="constrained")
for line, (term, pairs), letter in zip(axes, views.items(), "nmn", strict=True):
    for i, (panel, (keep, mask)) in enumerate(zip(line, pairs, strict=True), start=1):
        show_probability(panel, probability * keep, f"{letter} = {i}: {dice_loss(probability * keep, mask):.3f}")
        if mask.any():
            panel.contour(mask, levels=[0.5], colors=[FOUND], linewidths=1.6)
    line[0].set_ylabel(term)
figure.suptitle("grey: the prediction that the loss is given; green line: its target; number: the Dice loss")
plt.show()

values = functional.instance_terms(batch(logits), batch(truth), sigmoid=True)
blob_value = functional.blob_terms(batch(logits), batch(truth), sigmoid=True, pixel_loss="dice").blob
for (term, pairs), value in zip(views.items(), (values.instance_gt, values.instance_pred, blob_value), strict=True):
    drawn = np.mean([dice_loss(probability * keep, mask) for keep, mask in pairs])
    print(f"{term:<22} mean of the pictures {drawn:.6f}   fastinstance {value.item():.6f}")
    assert abs(drawn - value.item()) < 1e-9

# %% [markdown]
# ### Centres (Eq. 4)
#
# Every instance becomes a box of 3 × 3 pixels at its centroid, and a pixel loss compares the two maps. Size and outline
# are gone: what is left is how many lesions there are, and where. Lesion 1, found but shifted by two pixels, shares
# only two of nine; a merged or split lesion is as wrong here as a missed one.

# %%
maps = {"ground truth": np.zeros_like(truth), "prediction": np.zeros_like(truth)}
for drawn, labels in zip(maps.values(), (t, q), strict=True):
    for i in range(1, labels.max() + 1):
        drawn[reference.center_box(torch.as_tensor(labels == i), (3, 3))] = True
true_map, predicted_map = maps.values()

figure, axes = plt.subplots(1, 3, figsize=(11, 2.9), layout="constrained")
show(axes[0], ~truth, "ground truth", cmap="gray", vmin=-3)
show(axes[1], ~guess, "prediction", cmap="gray", vmin=-3)
for panel, drawn, colour in ((axes[0], true_map, MISSED), (axes[1], predicted_map, FALSE)):
    panel.imshow(np.ma.masked_where(~drawn, drawn), cmap=plt.matplotlib.colors.ListedColormap([colour]))
both = np.ones((*truth.shape, 3)) * 0.96
for where, colour in (
    (true_map & ~predicted_map, MISSED),
    (predicted_map & ~true_map, FALSE),
    (true_map & predicted_map, FOUND),
):
    both[where] = to_rgb(colour)
show(axes[2], both, f"both maps, Dice loss {dice_loss(predicted_map, true_map):.3f}")
figure.legend(
    handles=[
        Patch(color=MISSED, label="true box"),
        Patch(color=FALSE, label="predicted box"),
        Patch(color=FOUND, label="shared pixels"),
    ],
    loc="outside lower center",
    ncols=3,
    frameon=False,
)
plt.show()
assert abs(dice_loss(predicted_map, true_map) - values.center.item()) < 1e-9

# %% [markdown]
# ### False rates (Eqs. 5 and 6)
#
# The paper takes the floor of each Dice loss: 1 for an instance that shares no pixel with the other side, 0 for all
# others. The mean is the share of missed lesions, or of false predictions. The bars are the losses of the pictures
# above; only a full bar counts.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained")
for panel, pairs, value, colour, word, letter in (
    (axes[0], views["instance_gt (Eq. 2)"], values.false_gt, MISSED, "missed", "n"),
    (axes[1], views["instance_pred (Eq. 3)"], values.false_pred, FALSE, "false", "m"),
):
    losses = np.array([dice_loss(probability * keep, mask) for keep, mask in pairs])
    alone = np.array([not (guess & keep & mask).any() for keep, mask in pairs])
    panel.bar(np.arange(len(losses)) + 1, losses, color=np.where(alone, colour, FOUND))
    panel.set(ylim=(0, 1.1), xlabel=f"instance {letter}", ylabel="Dice loss", xticks=np.arange(len(losses)) + 1)
    panel.set_title(f"{word}: {alone.sum()} of {len(alone)}, rate {alone.mean():.2f}")
    panel.spines[["top", "right"]].set_visible(False)
    assert alone.mean() == value.item()
plt.show()

# %% [markdown]
# ### Proximity (Eqs. 7 to 10)
#
# Each instance looks for the nearest bounding box of the other side. "Near" is the Distance-IoU loss $D$: mostly below
# 1 where boxes overlap, up to 2 where they are far apart. With $S_{GT}=\sum_n D_n L_{GT}(n)$ and
# $S_P=\sum_m D_m L_P(m)$ the term is $(S_P-S_{GT})^2$. (Distances are relative to the box that encloses both, so the
# nearest box is not always the one that the eye would pick: see lesion 5.)
#
# Two things to know before training with it. It is the square of a difference of *sums*, so it grows with the number of
# instances: thousands for a network that has learnt nothing, which is why it needs a warm-up on the pixel loss. And it
# is 0 whenever both sums agree, even if both are bad.

# %%
boxes = [
    [reference.tight_box(torch.as_tensor(labels == i), (1.0, 1.0)) for i in range(1, labels.max() + 1)]
    for labels in (t, q)
]
distance = np.array([[reference.distance_iou_loss(a, b) for b in boxes[1]] for a in boxes[0]])
entries = [np.array([dice_loss(probability * k, g) for k, g in views[v]]) for v in list(views)[:2]]
sums = (distance.min(1) * entries[0]).sum(), (distance.min(0) * entries[1]).sum()

figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for panel, side, title in (
    (axes[0], 0, f"from each true lesion: $S_{{GT}}$ = {sums[0]:.2f}"),
    (axes[1], 1, f"from each prediction: $S_P$ = {sums[1]:.2f}"),
):
    show(panel, picture, title, alpha=0.35)
    for some, colour, line in ((boxes[0], MISSED, "-"), (boxes[1], FALSE, "--")):
        for box in some:
            (top, left), (bottom, right) = box.lower, box.upper
            corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
            panel.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.5, linestyle=line))
    for i, nearest in enumerate(distance.argmin(1 - side)):
        pair = boxes[side][i], boxes[1 - side][nearest]
        start, end = (np.array([(a + b) / 2 - 0.5 for a, b in zip(box.lower, box.upper, strict=True)]) for box in pair)
        panel.annotate("", end[::-1], start[::-1], arrowprops={"arrowstyle": "->", "color": "black", "lw": 1.3})
        panel.text(
            start[1],
            start[0] + 2.6,
            f"D = {distance.min(1 - side)[i]:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
figure.legend(
    handles=[
        Patch(fill=False, edgecolor=MISSED, label="true box"),
        Patch(fill=False, edgecolor=FALSE, linestyle="--", label="predicted box"),
    ],
    loc="outside lower center",
    ncols=2,
    frameon=False,
)
plt.show()
print(f"(S_P - S_GT)² = {(sums[1] - sums[0]) ** 2:.6f}   fastinstance {values.proximity.item():.6f}")
assert abs((sums[1] - sums[0]) ** 2 - values.proximity.item()) < 1e-9

# %% [markdown]
# ## 3. Where each term pushes
#
# A value does not train a network: a gradient does. The authors' released code returns the right values for the false
# rates and the centre term with a gradient of exactly zero, and for every instance term too when
# `activation="sigmoid"` is chosen. The causes are easy to make again:
#
# - a rate is a count divided by a count, and counting has no derivative;
# - a box is drawn from the coordinates of a component, and these are integers;
# - with `activation="sigmoid"` the probabilities are replaced by hard 0 or 1 before the terms see them.
#
# `fastinstance` defines a gradient for each. Instance, blob and proximity terms have their exact derivative with the
# labels held fixed. The false rates keep their value and take the derivative of the mean Dice loss of the same
# instances, before the floor. The centre term keeps its maps and lets each box rise and fall with the mean probability
# of its component.


# %%
def gradient(term):
    """Gradient with respect to the logits of a function of the logits; zero where they do not matter."""
    leaf = batch(logits).clone().requires_grad_()
    value = term(leaf)
    if not value.requires_grad:
        return np.zeros((HEIGHT, WIDTH)), value.item()
    (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return np.zeros((HEIGHT, WIDTH)) if slope is None else slope[0, 0].numpy(), value.item()


def ours(name):
    return lambda leaf: getattr(functional.instance_terms(leaf, batch(truth), sigmoid=True), name)


def hard(name):
    """The same term of probabilities that were rounded to 0 or 1 first."""
    return lambda leaf: getattr(functional.instance_terms(leaf.sigmoid().round(), batch(truth)), name)


def counted(labels_from, other_side):
    """A false rate as a count: ids of one side that do not appear where the other side is."""

    def rate(leaf):
        predicted = (leaf.sigmoid() >= 0.5).float()
        sides = {"true": batch(truth).float(), "predicted": predicted}
        labels, _ = fastinstance.label(sides[labels_from])
        total = labels.max()
        seen = torch.unique(labels * sides[other_side].int())
        return (total - (seen > 0).sum()) / total

    return rate


def drawn_centers(leaf):
    """The centre term with boxes drawn at integer coordinates, one after the other."""
    labels, number_of_ids = fastinstance.label(leaf.sigmoid() >= 0.5)
    drawn = torch.zeros_like(leaf)
    for i in range(1, int(number_of_ids) + 1):
        drawn[0, 0][reference.center_box(labels[0, 0] == i, (3, 3))] = 1.0
    return functional.pixel_loss(drawn, batch(true_map), pixel_loss="dice")


causes = {
    "rounded to 0 or 1": {name: hard(name) for name in ("instance_gt", "instance_pred", "proximity")},
    "boxes and rates\nfrom counts": {
        "center": drawn_centers,
        "false_gt": counted("true", "predicted"),
        "false_pred": counted("predicted", "true"),
    },
}
figure, axes = plt.subplots(5, 3, figsize=(11, 13), layout="constrained")


def show_gradient(axes, name, term):
    """−gradient, scaled by the largest slope, which is returned."""
    slope, value = gradient(term)
    largest = np.abs(slope).max()
    image = axes.imshow(-slope / (largest or 1), cmap="PuOr_r", vmin=-1, vmax=1)
    outline(axes, t, "black", 0.9)
    outline(axes, q, "grey", 0.7)
    axes.set(xticks=[], yticks=[], title=f"{name} = {value:.3g}", xlabel=f"largest slope {largest:.1e}")
    return image, largest


show(axes[0, 0], picture, "the scene")
show_gradient(axes[0, 1], "seg", ours("seg"))
show_gradient(axes[0, 2], "blob", lambda leaf: functional.blob_terms(leaf, batch(truth), sigmoid=True).blob)
for block, (cause, terms) in enumerate(causes.items()):
    for column, (name, zero) in enumerate(terms.items()):
        upper, lower = axes[1 + 2 * block : 3 + 2 * block, column]
        image, largest = show_gradient(upper, name, ours(name))
        assert largest > 1e-6
        _, largest = show_gradient(lower, name, zero)
        assert largest == 0
        box = {"facecolor": "white", "edgecolor": "none", "pad": 4}
        lower.text(0.5, 0.5, "zero everywhere", transform=lower.transAxes, ha="center", va="center", size=12, bbox=box)
        lower.set_xlabel("")
        if column == 0:
            upper.set_ylabel("fastinstance")
            lower.set_ylabel(cause)
bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, ticks=[-1, 0, 1])
bar.ax.set_xticklabels(["a step lowers p", "nothing", "a step raises p"])
figure.suptitle("−gradient in the logits, each picture on its own scale; black: true lesions, grey: predictions")
plt.show()

# %% [markdown]
# Read the pictures, not only the theory:
#
# - The instance terms act inside predictions only. `instance_gt` raises what lies on lesions and lowers what sticks
#   out; the part of lesion 4 that nobody predicts is masked away and feels nothing.
# - The missed lesion 5 and the false prediction feel no instance term either: the Dice loss of two masks that do not
#   meet is 1 however large they are. This is why every loss of the family keeps a pixel loss (`seg`), which raises the
#   one and lowers the other. Blob loss and the centre term lower the false one too.
# - The false rates act on the lesions that *are* found, and so make the network keener everywhere. That is their
#   strength and their price: more lesions found, more false ones.
# - `proximity`: here $S_P$ is larger than $S_{GT}$, so the term lowers the one and *raises* the other. On the merged
#   pair it even lowers the probability of true pixels. It is a correction for the end of a training.
#
# ## 4. Whom does the gradient serve?
#
# Last, the reason for all of this in one figure: how much of the gradient falls on each lesion of the first scene, when
# the network is equally unsure about all of them (p = 0.6 on every lesion).

# %%
labels = ids(target)
pixels = np.bincount(labels.ravel())[1:]
order = np.argsort(-pixels, kind="stable")
unsure = batch(np.where(target, 0.4, -4.0))
shares = {}
for name, loss in {
    "Dice loss (pixels)": lambda z: functional.pixel_loss(z, batch(target), sigmoid=True, pixel_loss="dice"),
    "Generalized Dice + focal (pixels)": lambda z: functional.pixel_loss(z, batch(target), sigmoid=True),
    "instance_gt (Eq. 2)": lambda z: functional.instance_terms(z, batch(target), sigmoid=True).instance_gt,
}.items():
    leaf = unsure.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf)
    on_lesion = np.bincount(labels.ravel(), weights=slope.abs().numpy().ravel())[1:]
    shares[name] = 100 * on_lesion / on_lesion.sum()

figure, axes = plt.subplots(figsize=(11, 2.8), layout="constrained")
place = np.arange(len(pixels))
for i, ((name, share), colour, hatch) in enumerate(
    zip(shares.items(), ("#999999", "#E69F00", FOUND), ("", "//", ""), strict=True)
):
    left = place + (i - 1) * 0.27
    bars = axes.bar(left, share[order], 0.26, label=name, color=colour, hatch=hatch, edgecolor="white")
    axes.bar_label(bars, fmt="%.0f", fontsize=8)
axes.set_xticks(place, [f"{size} px" for size in pixels[order]])
axes.set(xlabel="lesion", ylabel="share of the gradient, %")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The pixel losses spend four fifths of their gradient on the large lesion, because it has four fifths of the pixels.
# The instance loss gives every lesion the same.
#
# Next: `02_profile` shows what this costs, `03_train_lesions` what it changes in a training, `04_property_checks` how
# to test a loss of your own.
