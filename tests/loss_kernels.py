"""Kernels that call every device function of `fastinstance_kernels.losses`: for the interpreter, and to compile."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from fastinstance_kernels.losses import (
    channel_slopes,
    channel_value,
    features,
    form_slopes,
    form_value,
    joint_sums,
    joint_upstream,
    pointwise,
    pointwise_slope,
    slopes,
)


@triton.jit
def of_pixels(values, target, out, n, LOGITS: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr):
    """out [6, n]: w, c, p, dp/dx, v, dv/dx."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(values + i, mask=inside, other=0.0)
    positive = tl.load(target + i, mask=inside, other=0) != 0
    w, c, p = features(x, positive, LOGITS)
    tl.store(out + i, w, mask=inside)
    tl.store(out + n + i, c, mask=inside)
    tl.store(out + 2 * n + i, p, mask=inside)
    tl.store(out + 3 * n + i, slopes(x, positive, LOGITS), mask=inside)
    tl.store(out + 4 * n + i, pointwise(w, c, GAMMA), mask=inside)
    tl.store(out + 5 * n + i, pointwise_slope(x, positive, LOGITS, GAMMA), mask=inside)


@triton.jit
def of_planes(sums, omega, out, n, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, 4]: R, dR/dPG, dR/dP, dR/dV of sums [n, 4]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    pg = tl.load(sums + i * 4, mask=inside, other=1.0)
    p = tl.load(sums + i * 4 + 1, mask=inside, other=1.0)
    g = tl.load(sums + i * 4 + 2, mask=inside, other=1.0)
    v = tl.load(sums + i * 4 + 3, mask=inside, other=0.0)
    pixels = tl.load(omega + i, mask=inside, other=1.0)
    tl.store(out + i * 4, form_value(pg, p, g, v, pixels, FORM), mask=inside)
    by_pg, by_p, by_v = form_slopes(pg, p, g, v, pixels, FORM)
    tl.store(out + i * 4 + 1, by_pg, mask=inside)
    tl.store(out + i * 4 + 2, by_p, mask=inside)
    tl.store(out + i * 4 + 3, by_v, mask=inside)


@triton.jit
def of_channels(
    sums, omega, upstream, out, images, C, FORM: tl.constexpr, CATEGORICAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [images · C, 4]: R, and the derivatives of Σ upstream · R by PG, P and V."""
    image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = image < images
    joint = joint_sums(sums, omega, image, inside, C)
    total = joint_upstream(upstream, image, inside, C)
    c = 0
    while c < C:
        to = out + (image * C + c) * 4
        tl.store(to, channel_value(sums, omega, joint, image, inside, c, C, FORM, CATEGORICAL), mask=inside)
        by_pg, by_p, by_v = channel_slopes(
            sums, omega, upstream, joint, total, image, inside, c, C, FORM, CATEGORICAL
        )  # fmt: skip
        tl.store(to + 1, by_pg, mask=inside)
        tl.store(to + 2, by_p, mask=inside)
        tl.store(to + 3, by_v, mask=inside)
        c += 1
