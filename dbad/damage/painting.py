"""Building blocks of the kinds of damage: noise, regions, tones, and pieces cut out of good images."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dbad.damage.site import Site, Window, trimmed, window
from dbad.shapes import coverage, turned


def perlin(shape: tuple[int, int], cell: float | np.floating, rng: np.random.Generator) -> np.ndarray:
    """Gradient noise (Perlin, SIGGRAPH 1985, with the quintic of 2002), about [-1, 1]; one gradient per `cell` px."""
    cell = max(cell, 1.5)
    y, x = (np.arange(length) / cell + rng.uniform() for length in shape)
    angle = rng.uniform(0, 2 * np.pi, (int(y[-1]) + 2, int(x[-1]) + 2))
    i, j = y.astype(int), x.astype(int)
    fy, fx = (y - i)[:, None], (x - j)[None]
    total = np.zeros(shape)
    for di in (0, 1):
        for dj in (0, 1):
            corner = angle[np.ix_(i + di, j + dj)]
            wy, wx = (t ** 3 * (t * (6 * t - 15) + 10) for t in (1 - np.abs(fy - di), 1 - np.abs(fx - dj)))
            total += wy * wx * (np.sin(corner) * (fy - di) + np.cos(corner) * (fx - dj))
    return (2 ** 0.5 * total).astype(np.float32)


def blob(site: Site, rough: float = 0.0, softness: float = 0.5) -> tuple[Window, np.ndarray]:
    """A compact region of `site.area` pixels around the centre: its window, and its opacity alpha (h, w) in [0, 1].

    The region is a turned ellipse or rounded box with a wavy outline, cut to the object. It consists of the nearest
    pixels, by a distance of that shape, so that its area does not depend on its place.

        rough       how strongly Perlin noise frays the outline; 1 tears the region into islands
        softness    largest width of the edge, as a share of the radius; at least one pixel
    """
    rng, radius = site.rng, np.float32((site.area / np.pi) ** 0.5)
    stretch = np.float32(np.exp(rng.uniform(0, np.log(2))))
    here = window(site, 1.8 * stretch * radius + 3)
    u, v = turned(here.x, here.y, (0, 0), rng.uniform(0, np.pi))
    u, v, angle = np.abs(u) / stretch, np.abs(v) * stretch, np.arctan2(v * stretch, u / stretch)
    distance = np.hypot(u, v) / radius
    distance += rng.choice([0, 0, 0.5, 1]) * (np.maximum(u, v) / radius - distance)
    for order in (2, 3, 5):
        distance = distance * (1 + rng.uniform(0, 0.25) / order ** 0.5 * np.cos(order * angle + rng.uniform(0, 6.28)))
    if rough:
        distance = distance + rough * perlin(distance.shape, rng.uniform(0.5, 1.2) * radius, rng)
    inside = here.cover > 0
    last = min(round(site.area), inside.sum()) - 1
    level = np.partition(distance[inside], last)[last]
    edge = max(1.0, rng.uniform(0, softness) * radius)
    # A wide edge lies inside: beyond the level, only the pixels that it cuts are touched.
    return trimmed(here, here.cover * coverage((distance - level) * radius / stretch + (edge - 1) / 2, edge))


def tone(near: np.ndarray, contrast: float, site: Site) -> np.ndarray:
    """A colour (3,) whose most different channel is `contrast` away from `near` (3,): darker, brighter or tinted."""
    rng = site.rng
    direction = np.ones(3)
    if not site.picture.gray:
        direction = rng.uniform(-1, 1, 3) if rng.uniform() < 0.4 else rng.uniform(0.6, 1, 3)
        direction = direction / np.abs(direction).max()
    direction = direction * rng.choice([-1, 1])
    options = [np.clip(near + sign * contrast * direction, 0, 1) for sign in (1, -1)]
    reached = [np.abs(option - near).max() for option in options]
    return options[int(reached[0] < 0.8 * contrast and reached[1] > reached[0])].astype(np.float32)


def mean_colour(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The mean of pixels (h, w, 3) weighted by alpha, (3,)."""
    return np.einsum("hwc,hw->c", pixels, alpha) / max(alpha.sum(), 1e-6)


def lay(pixels: np.ndarray, full: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The pixels covered by `full`, (h, w, 3) or a colour (3,), with opacity alpha; unchanged where alpha is 0."""
    return np.where(alpha[..., None] > 0, pixels + alpha[..., None] * (full - pixels), pixels)


def faded(site: Site, here: Window, full: np.ndarray, alpha: np.ndarray, least: float) -> np.ndarray:
    """The window covered by `full`, faded until the mean change is the site's contrast; the opacity is `least` to 1."""
    change = np.abs(full - here.pixels).max(axis=2)
    mean = (alpha * change).sum() / max(alpha.sum(), 1e-6)
    return lay(here.pixels, full, alpha * np.clip(site.contrast / max(mean, 1e-6), least, 1))


def cut(site: Site, here: Window, scale: float = 1.0) -> np.ndarray:
    """A piece of the window's size from the object of a good image, turned, perhaps mirrored, `scale` times larger.

    Half the pieces are turned by right angles only and keep their pixels as they are.
    """
    rng = site.rng
    source = site.sources[int(rng.integers(len(site.sources)))]
    centre = source.pick(source.places, rng)
    angle = rng.integers(4) * np.pi / 2 if rng.uniform() < 0.5 else rng.uniform(0, 2 * np.pi)
    x, y = turned(here.x * rng.choice([-1, 1]), here.y, (0, 0), angle)
    return sampled(source.pixels, centre[0] + y / scale, centre[1] + x / scale)


def sampled(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The picture at fractional positions (h, w), by cubic splines, mirrored beyond its border; (h, w, 3)."""
    at = np.stack([rows, columns])
    low = np.clip(np.floor(at.min(axis=(1, 2))).astype(int) - 6, 0, np.array(pixels.shape[:2]) - 1)
    high = np.clip(np.ceil(at.max(axis=(1, 2))).astype(int) + 7, 1, pixels.shape[:2])
    part = pixels[low[0]:high[0], low[1]:high[1]]           # fit splines only to what is needed
    at = at - low[:, None, None]
    return np.stack([ndimage.map_coordinates(part[..., c], at, order=3, mode="mirror") for c in range(3)], 2).clip(0, 1)
