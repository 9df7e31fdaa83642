"""Separable losses in kernels: what a pixel adds to the sums, and the reduction of the sums; with their derivatives.

Functions for other kernels to call. Those of a pixel take a block of float32 or float64 values and give the same type;
those of the sums work on blocks of float64. A reduction is a compile-time `FORM`,
the `numbers` of a `fastinstance.pixel.Form`: flat, since Triton does not take nested tuples at compile time.
"""

# Compile-time parameters are annotated tl.constexpr and take Python values.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl

EPS = tl.constexpr(1e-7)  # the logarithm of a given probability is log(max(p, EPS))
MISSED = tl.constexpr(-math.log(1e-7))
"""The pointwise function of a pixel of the target that is masked out of the prediction (p = 0)."""

PLAIN, GENERALIZED, INVERSE = (tl.constexpr(i) for i in range(3))

# FORM: the pointwise weight, the one of it whose channels may be joined, and RATIO numbers for each ratio.
RATIOS = tl.constexpr(2)
RATIO = tl.constexpr(8)


@triton.jit
def _logistic(x):
    """σ(|x|), σ(-|x|) and log(1 + exp(-|x|)), all from e = exp(-|x|), so that nothing cancels at either end."""
    e = tl.exp(-tl.abs(x))
    if x.dtype == tl.float64:
        u = 1 + e
        exact = u == 1
        # log(1 + e) with all digits of a small e (Kahan): the rounding of 1 + e cancels.
        log = tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1.0, u - 1)))
        high = 1 / u
    else:
        # log(1 + e) = 2 artanh s with s = e / (2 + e) <= 1/3: artanh(s) / s is a polynomial in s², to 4e-9. Fewer
        # instructions than a logarithm, and one division gives both.
        both = 1 / ((1 + e) * (2 + e))
        high = (2 + e) * both
        s = e * ((1 + e) * both)
        z = s * s
        log = s * (2 + z * (0.66666316 + z * (0.40024853 + z * (0.27961418 + z * 0.28174657))))
    return high, e * high, log


@triton.jit
def power(w, EXPONENT: tl.constexpr):
    """w^EXPONENT for w >= 0 and EXPONENT >= 0."""
    if EXPONENT == 0:
        return tl.full(w.shape, 1.0, w.dtype)
    elif int(EXPONENT) == EXPONENT and EXPONENT <= 8:
        result = w
        for _ in tl.static_range(int(EXPONENT) - 1):
            result *= w
        return result
    else:
        some = w > 0
        return tl.where(some, tl.exp2(EXPONENT * tl.log2(tl.where(some, w, 1.0))), 0.0)


@triton.jit
def features(x, positive, LOGITS: tl.constexpr):
    """w = |p - G|, its cost c = -log(1 - w), and p, of logits or probabilities x with G = 1 where `positive`."""
    if LOGITS:
        s = tl.where(positive, -x, x)  # the logit of the wrong answer
        high, low, log = _logistic(x)
        return tl.where(s >= 0, high, low), tl.maximum(s, 0.0) + log, tl.where(x >= 0, high, low)
    else:
        right = tl.where(positive, x, 1 - x)
        cost = -tl.log(tl.maximum(right, tl.full(right.shape, EPS, right.dtype)))
        return tl.where(positive, 1 - x, x), cost, x


@triton.jit
def slopes(x, positive, LOGITS: tl.constexpr):
    """dp/dx."""
    if LOGITS:
        high, low, _ = _logistic(x)
        return high * low
    else:
        return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def pointwise(w, c, GAMMA: tl.constexpr):
    """v = w^gamma · c."""
    if GAMMA == 0:
        return c
    else:
        return power(w, GAMMA) * c


@triton.jit
def pointwise_slope(x, positive, LOGITS: tl.constexpr, GAMMA: tl.constexpr):
    """dv/dx."""
    w, c, _ = features(x, positive, LOGITS)
    if LOGITS:
        slope = w
        if GAMMA != 0:
            slope = power(w, GAMMA) * (w + GAMMA * c * (1 - w))
    else:
        right = tl.where(positive, x, 1 - x)
        above = right > EPS  # c is constant below
        slope = tl.where(above, 1 / tl.where(above, right, 1.0), 0.0)
        if GAMMA != 0:
            slope = power(w, GAMMA - 1) * (w * slope + GAMMA * c)
    return tl.where(positive, -slope, slope)


@triton.jit
def _weights(G, omega, WEIGHTING: tl.constexpr):
    """The weight of the pixels of a plane inside of its target, and outside."""
    if WEIGHTING == GENERALIZED:
        inside = tl.where(G > 0, 1 / (tl.maximum(G, 1.0) * tl.maximum(G, 1.0)), 0.0)
        return inside, inside
    elif WEIGHTING == INVERSE:
        share = tl.where(G > 0, omega / 2, omega)
        return share / tl.maximum(G, 1.0), share / tl.maximum(omega - G, 1.0)
    else:
        one = tl.full(G.shape, 1.0, G.dtype)
        return one, one


@triton.jit
def _weigh(PG, P, G, inside, outside):
    """The sums PG, P, G of weighted pixels."""
    return inside * PG, outside * P + (inside - outside) * PG, inside * G


@triton.jit
def _quotient(PG, P, G, FORM: tl.constexpr, r: tl.constexpr):
    """Numerator and denominator of the ratio that begins at FORM[r]."""
    numerator = FORM[r + 1] * PG + FORM[r + 2]
    return numerator, FORM[r + 3] * PG + FORM[r + 4] * P + FORM[r + 5] * G + FORM[r + 6]


@triton.jit
def _value(PG, P, G, mean, omega, joint, FORM: tl.constexpr):
    """R, where `joint` holds the sums PG, P, G of the generalized ratios and the mean of the joined pointwise part."""
    joint_PG, joint_P, joint_G, joint_mean, _ = joint
    value = FORM[0] * mean + FORM[1] * joint_mean
    for r in tl.static_range(RATIOS, len(FORM), RATIO):
        if FORM[r + 7] == GENERALIZED:
            n, d = _quotient(joint_PG, joint_P, joint_G, FORM, r)
        else:
            inside, outside = _weights(G, omega, FORM[r + 7])
            weighted_PG, weighted_P, weighted_G = _weigh(PG, P, G, inside, outside)
            n, d = _quotient(weighted_PG, weighted_P, weighted_G, FORM, r)
        value += FORM[r] * (1 - n / d)
    return value


@triton.jit
def _slopes(PG, P, G, omega, joint, weight, own, ratios, means, FORM: tl.constexpr):
    """The derivatives by PG, P and V of a plane that has this `weight` in the joint sums.

    The upstream derivatives are those of the plane's `own` part, of all generalized `ratios` and of all joined `means`
    that it has a part in.
    """
    joint_PG, joint_P, joint_G, _, _ = joint
    by_V = (FORM[0] * own + FORM[1] * means) / tl.maximum(omega, 1.0)
    by_PG, by_P = tl.zeros_like(by_V), tl.zeros_like(by_V)
    for r in tl.static_range(RATIOS, len(FORM), RATIO):
        if FORM[r + 7] == GENERALIZED:
            inside, outside, factor = weight, weight, FORM[r] * ratios
            n, d = _quotient(joint_PG, joint_P, joint_G, FORM, r)
        else:
            inside, outside = _weights(G, omega, FORM[r + 7])
            factor = FORM[r] * own
            weighted_PG, weighted_P, weighted_G = _weigh(PG, P, G, inside, outside)
            n, d = _quotient(weighted_PG, weighted_P, weighted_G, FORM, r)
        factor = factor / d
        by_PG += factor * (n / d * (FORM[r + 3] * inside + FORM[r + 4] * (inside - outside)) - FORM[r + 1] * inside)
        by_P += factor * (n / d) * FORM[r + 4] * outside
    return by_PG, by_P, by_V


@triton.jit
def _alone(PG, P, G, V, omega):
    """The joint sums of a plane that shares them with no other: see `joint_sums`."""
    weight, _ = _weights(G, omega, GENERALIZED)
    return weight * PG, weight * P, weight * G, V / tl.maximum(omega, 1.0), weight


@triton.jit
def form_value(PG, P, G, V, omega, FORM: tl.constexpr):
    """R of independent planes or instances."""
    joint = _alone(PG, P, G, V, omega)
    return _value(PG, P, G, joint[3], omega, joint, FORM)


@triton.jit
def form_slopes(PG, P, G, V, omega, FORM: tl.constexpr):
    """dR/dPG, dR/dP, dR/dV of independent planes or instances."""
    joint = _alone(PG, P, G, V, omega)
    one = tl.full(PG.shape, 1.0, PG.dtype)
    return _slopes(PG, P, G, omega, joint, joint[4], one, one, one, FORM)


@triton.jit
def _load_plane(sums, omega, plane, mask):
    """PG, P, G, V and |Ω| of planes; where there is none, numbers that divide without a remark."""
    row = sums + plane * 4
    PG = tl.load(row, mask=mask, other=1.0)
    P = tl.load(row + 1, mask=mask, other=1.0)
    G = tl.load(row + 2, mask=mask, other=1.0)
    V = tl.load(row + 3, mask=mask, other=0.0)
    return PG, P, G, V, tl.load(omega + plane, mask=mask, other=1.0).to(tl.float64)


@triton.jit
def joint_sums(sums, omega, image, mask, C):
    """What the channels of an image share: the weighted PG, P, G of Generalized Dice and the mean of V, and the
    largest weight of a channel, which is that of the empty ones.

    Args:
        sums: pointer to float64 [B·C, 4]: PG, P, G, V of each plane.
        omega: pointer to [B·C], |Ω| of each plane.
        image, mask: block of images, and which of them exist.
        C: channels of an image.
    """
    zero = tl.zeros(image.shape, tl.float64)
    joint_PG, joint_P, joint_G, mean, largest, empty_P = zero, zero, zero, zero, zero, zero
    c = 0
    while c < C:
        PG, P, G, V, pixels = _load_plane(sums, omega, image * C + c, mask)
        own_PG, own_P, own_G, own_mean, weight = _alone(PG, P, G, V, pixels)
        joint_PG += own_PG
        joint_P += own_P
        joint_G += own_G
        mean += own_mean
        largest = tl.maximum(largest, weight)
        empty_P += tl.where(G > 0, 0.0, P)
        c += 1
    return joint_PG, joint_P + largest * empty_P, joint_G, mean, largest


@triton.jit
def joint_upstream(upstream, image, mask, C):
    """Sum of the upstream derivatives, pointer to [B·C], over the channels of each image; float64."""
    total = tl.zeros(image.shape, tl.float64)
    c = 0
    while c < C:
        total += tl.load(upstream + image * C + c, mask=mask, other=0.0).to(tl.float64)
        c += 1
    return total


@triton.jit
def channel_value(sums, omega, joint, image, mask, c, C, FORM: tl.constexpr, CATEGORICAL: tl.constexpr):
    """R of channel c of the pixel term of each image; `joint` from `joint_sums`."""
    PG, P, G, V, pixels = _load_plane(sums, omega, image * C + c, mask)
    mean = V / tl.maximum(pixels, 1.0)
    if not CATEGORICAL:
        joint = (joint[0], joint[1], joint[2], mean, joint[4])
    return _value(PG, P, G, mean, pixels, joint, FORM)


@triton.jit
def channel_slopes(
    sums, omega, upstream, joint, total, image, mask, c, C, FORM: tl.constexpr, CATEGORICAL: tl.constexpr
):  # fmt: skip
    """Derivatives of Σ upstream · R over the channels of each image, by PG, P and V of channel c.

    `joint` from `joint_sums`, `total` from `joint_upstream`.
    """
    plane = image * C + c
    PG, P, G, _, pixels = _load_plane(sums, omega, plane, mask)
    own = tl.load(upstream + plane, mask=mask, other=0.0).to(tl.float64)
    weight, _ = _weights(G, pixels, GENERALIZED)
    weight = tl.where(G > 0, weight, joint[4])
    return _slopes(PG, P, G, pixels, joint, weight, own, total, total if CATEGORICAL else own, FORM)
