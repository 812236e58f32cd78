"""Carpet: a woven texture that fills the frame, with a stain, a slit or a loose thread."""
import numpy as np

from dbad.shapes import blend, blob, coverage, exposed, grid, mixed, polyline, smoothstep, turned, waves


def carpet(size, rng, flaw):
    """A picture of a plain weave of thick yarn; every fifth yarn is lighter."""
    x, y, pixel = grid(size)
    a, b = turned(x, y, (0, 0), rng.uniform(-0.1, 0.1))
    pitch = 0.19 * rng.uniform(0.93, 1.07)
    a = a / pitch + rng.uniform(0, 10) + 0.08 * waves(x, y, rng, 1.6, 3)
    b = b / pitch + rng.uniform(0, 10) + 0.08 * waves(x, y, rng, 1.6, 3)
    i, j = np.floor(a).astype(int), np.floor(b).astype(int)
    across_warp, across_weft = np.sin(np.pi * (a - i)), np.sin(np.pi * (b - j))                  # 0 at a yarn's edges
    rise = 1 - 2 * (i % 2)
    fall = 1 - 2 * (j % 2)
    warp = across_warp * (1 + 0.9 * rise * fall * across_weft)                                   # height of either yarn
    weft = across_weft * (1 - 0.9 * rise * fall * across_warp)
    on_top = smoothstep(-0.5, 0.5, (warp - weft) * min(4.0, pitch / pixel / 2))
    height = np.maximum(warp, weft) / 1.9

    # Two colours of yarn, which vary between carpets from slate to sand, and the lighter fifth yarn.
    shade = rng.uniform()
    dark, light = mixed(rng, (0.24, 0.30, 0.40), (0.42, 0.35, 0.30)), mixed(rng, (0.42, 0.50, 0.58), (0.66, 0.58, 0.46))
    accent = mixed(rng, (0.80, 0.74, 0.62), (0.95, 0.92, 0.85))
    dark, light = dark * (0.8 + 0.4 * shade), light * (0.8 + 0.4 * shade)
    tint = 1 + 0.035 * rng.standard_normal((2, 64)).astype(np.float32)
    warps = np.where((i % 5 == 0)[..., None], accent, dark) * tint[0][i % 64][..., None]
    wefts = np.where((j % 5 == 0)[..., None], accent, light) * tint[1][j % 64][..., None]
    image = (wefts + on_top[..., None] * (warps - wefts)).astype(np.float32)
    twist = on_top * np.cos(6.28 * (a + 2 * b)) + (1 - on_top) * np.cos(6.28 * (b + 2 * a))
    fibre = 0.05 * twist + 0.03 * waves(a, b, rng, 0.9)
    image *= ((0.34 + 0.72 * np.sqrt(height)) * (1 + fibre))[..., None].astype(np.float32)

    cover = np.zeros_like(x)
    if flaw is not None:
        cover = carpet_flaw(image, flaw, x, y, pixel)
    return exposed(image, rng, x, y, (0.72, 1.18), 0.22), cover


def carpet_flaw(image, flaw, x, y, pixel):
    """Paint a stain, a slit or a loose thread on the carpet; returns its coverage."""
    rng = flaw.rng
    x, y = turned(x, y, rng.uniform(-0.6, 0.6, 2), rng.uniform(0, 6.28))
    if flaw.kind == "color":
        distance = blob(x, y, flaw.size(0.36, 0.54) / 2, rng)
        cover = coverage(distance, pixel)
        dye = np.float32([(0.58, 0.13, 0.18), (0.13, 0.42, 0.20), (0.44, 0.12, 0.52)][rng.integers(3)])
        light = image.mean(axis=2, keepdims=True)
        blend(image, dye * (0.45 + 1.1 * light), 0.9 * cover)
    elif flaw.kind == "cut":
        length = flaw.size(0.6, 0.9)
        halves = flaw.width(length, 0.26, 0.33) / 2 * np.array([0.1, 0.7, 1, 1, 0.7, 0.1])
        points = np.stack([np.linspace(-0.5, 0.5, 6) * length, 0.04 * length * rng.standard_normal(6)], axis=1)
        distance = polyline(x, y, points, halves)
        frayed = distance + 0.12 * halves.max() * np.cos(x / max(halves.max(), pixel) * 5.5)
        cover = coverage(frayed, pixel)
        blend(image, (0.15, 0.11, 0.08), cover)
        blend(image, (0.07, 0.05, 0.045), coverage(frayed + 0.35 * halves.max(), pixel))
    else:
        length = flaw.size(0.8, 1.2)
        half = flaw.width(length, 0.1, 0.12) / 2
        t = np.linspace(-0.5, 0.5, 12)
        bend, swing = rng.uniform(0.08, 0.2) * rng.choice([-1, 1]), rng.uniform(-0.1, 0.1)
        points = length * np.stack([t, bend * np.cos(np.pi * t * 1.6) + swing * np.sin(2 * np.pi * t)], axis=1)
        distance = polyline(x, y, points, [half] * 12)
        below = polyline(x - 0.5 * half, y - 0.6 * half, points, [half] * 12)
        cover = np.maximum(coverage(distance, pixel), coverage(below, pixel))
        blend(image, (0.10, 0.09, 0.09), coverage(below, pixel))
        yarn = mixed(rng, (0.84, 0.80, 0.70), (0.93, 0.90, 0.86))
        rounded = 1 - 0.35 * np.clip(1 + distance / half, 0, 1) ** 2
        blend(image, yarn * rounded[..., None], coverage(distance, pixel))
    return cover
