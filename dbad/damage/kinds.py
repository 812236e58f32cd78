"""The kinds of damage a pseudo-anomaly can show, each painted on a window of a good image.

A kind is a function from a `Site` to the `Window` it worked on and that window's new pixels. A pixel that it leaves
unchanged does not belong to the anomaly. Sizes that a kind draws itself are shares of the image's side, so that the
damage looks the same at any resolution.

Sources: cutting, pasting and scars, CutPaste (arXiv:2104.04015); foreign texture behind thresholded Perlin noise, DRAEM
(arXiv:2108.07610); pasting by the Poisson equation, see `dbad.damage.poisson`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import ndimage

from dbad.damage.painting import blob, cut, faded, lay, mean_colour, perlin, sampled, tone
from dbad.damage.poisson import solve_poisson
from dbad.damage.site import Site, Window, window
from dbad.shapes import coverage, polyline, rounded_box, turned

# Pieces of good images.

def cut_paste(site: Site) -> tuple[Window, np.ndarray]:
    """A piece of a good image with a feathered edge, brighter or darker than it was."""
    here, alpha = blob(site)
    piece = cut(site, here, np.exp(site.rng.uniform(-0.3, 0.3))) * site.rng.uniform(0.75, 1.25)
    return here, faded(site, here, piece, alpha, least=0.6)


def poisson_paste(site: Site) -> tuple[Window, np.ndarray]:
    """A piece of a good image that takes on the colours around it and leaves no edge."""
    here, alpha = blob(site)
    piece = cut(site, here) * site.rng.uniform(0.8, 1.6)
    return here, solve_poisson(here.pixels, piece, within(site, here, alpha >= 0.5))


def within(site: Site, here: Window, region: np.ndarray) -> np.ndarray:
    """The region without the object's outline, where the background bleeds in; the whole one if half would be lost."""
    left = region & site.picture.inner[here.box]
    return left if 2 * left.sum() > region.sum() else region


def missing(site: Site) -> tuple[Window, np.ndarray]:
    """A region filled from its surroundings, or a bite at the object's rim, filled from the background alone."""
    rng, rim = site.rng, site.picture.rim
    bite = len(rim) > 0 and rng.uniform() < 0.5
    if bite:
        site = replace(site, at=site.picture.pick(rim, rng))
    here, alpha = blob(site, softness=0.1)
    region = alpha >= 0.5
    if bite and (here.cover == 0).any():
        nearest = ndimage.distance_transform_edt(here.cover > 0, return_distances=False, return_indices=True)
        smooth = (0.1 * site.area ** 0.5,) * 2 + (0,)
        filled = lay(here.pixels, ndimage.gaussian_filter(here.pixels[tuple(nearest)], smooth), alpha)
    else:
        region = within(site, here, region)
        filled = solve_poisson(here.pixels, np.zeros_like(here.pixels), region)
    grain = here.pixels - ndimage.uniform_filter(here.pixels, (3, 3, 1))
    sigma = min(0.03, float(np.median(np.abs(grain))) * 1.5)        # without it the filling is smoother than any photo
    return here, filled + np.float32(sigma) * region[..., None] * rng.standard_normal((*region.shape, 1))


# Foreign matter.

def texture(site: Site) -> tuple[Window, np.ndarray]:
    """A foreign texture in frayed islands: stripes, checks, marble, or a good image distorted beyond recognition."""
    here, alpha = blob(site, rough=site.rng.uniform(0.4, 1.2))
    return here, faded(site, here, foreign(site, here, mean_colour(here.pixels, alpha)), alpha, least=0.2)


def foreign(site: Site, here: Window, near: np.ndarray) -> np.ndarray:
    """A texture (h, w, 3) of the window's size, made of random tones or of a distorted good image."""
    rng, shape = site.rng, here.cover.shape
    if rng.uniform() < 0.4:
        piece = cut(site, here, np.exp(rng.uniform(-1, 0.7)))[..., rng.permutation(3)]
        piece = 1 - piece if rng.uniform() < 0.5 else piece
        return np.clip((piece - piece.mean()) * rng.uniform(1, 2.5) + rng.uniform(0.2, 0.8), 0, 1)
    period = site.picture.side * np.exp(rng.uniform(np.log(0.012), np.log(0.06)))
    u, v = turned(here.x, here.y, (0, 0), rng.uniform(0, np.pi))
    bend = rng.uniform(0, 6) * perlin(shape, 3 * period, rng)
    wave = np.sin(2 * np.pi * u / period + bend)
    if rng.uniform() < 0.4:
        wave = wave * np.sin(2 * np.pi * v / period + bend)
    wave = np.clip(wave * rng.uniform(1, 4), -1, 1) / 2 + 0.5 + rng.uniform(0, 0.2) * rng.standard_normal(shape)
    first, second = (tone(near, rng.uniform(0.15, 0.7), site) for _ in range(2))
    return np.clip(first + wave[..., None] * (second - first), 0, 1)


def stain(site: Site) -> tuple[Window, np.ndarray]:
    """A soft, uneven discolouration that lets the surface show through, sometimes with a darker seam."""
    rng = site.rng
    here, alpha = blob(site, rough=rng.uniform(0, 0.5), softness=1.0)
    near = mean_colour(here.pixels, alpha)
    shift = tone(near, site.contrast, site) - near
    density = 1 + rng.uniform(0, 0.5) * perlin(alpha.shape, 0.3 * site.area ** 0.5, rng)
    if rng.uniform() < 0.4:
        density = density * (0.5 + 2 * alpha * (1 - alpha))
    darker = here.pixels * np.clip(near + shift, 0, 1) / np.maximum(near, 0.02)      # absorbed in proportion
    changed = np.where(shift < 0, darker, here.pixels + shift)
    return here, lay(here.pixels, np.clip(changed, 0, 1), alpha * np.clip(density, 0, 1))


def spots(site: Site) -> tuple[Window, np.ndarray]:
    """One to six dots of 1.5 to 5 % of the side, dark, bright or coloured."""
    rng, side = site.rng, site.picture.side
    count = min(6, rng.geometric(0.45))
    diameters = np.maximum(side * np.exp(rng.uniform(np.log(0.015), np.log(0.05), count)), 2)
    places = rng.normal(0, side * rng.uniform(0.02, 0.06), (count, 2)) * (np.arange(count) > 0)[:, None]
    here = window(site, np.abs(places).max() + diameters.max() + 2)
    pixels = here.pixels
    colour = None
    for (y, x), diameter in zip(places, diameters, strict=True):
        u, v = turned(here.x, here.y, (x, y), rng.uniform(0, np.pi))
        stretch = rng.uniform(1, 1.25)
        away = np.hypot(u / stretch, v * stretch) - diameter / 2
        alpha = here.cover * coverage(away, max(1.0, rng.uniform(0, 0.5) * diameter))
        if colour is None or rng.uniform() < 0.2:
            colour = tone(mean_colour(here.pixels, alpha), site.contrast, site)
        pixels = lay(pixels, colour, alpha * rng.uniform(0.8, 1))
    return here, pixels


# Lines.

def scar(site: Site) -> tuple[Window, np.ndarray]:
    """A thin straight strip: a piece of a good image with another brightness, or one flat tone."""
    rng, side = site.rng, site.picture.side
    width = max(1.5, side * rng.uniform(0.01, 0.04))
    length = np.clip(site.area / width, 2.5 * width, 0.4 * side)
    here = window(site, length / 2 + 2)
    u, v = turned(here.x, here.y, (0, 0), rng.uniform(0, np.pi))
    alpha = here.cover * coverage(rounded_box(u, v, length / 2, width / 2, rng.uniform(0, 0.5) * width), 1.0)
    if rng.uniform() < 0.5:
        full = cut(site, here) * rng.uniform(0.5, 1.5)
    else:
        near = mean_colour(here.pixels, alpha)
        full = tone(near, site.contrast, site) + rng.uniform(0.2, 1) * (here.pixels - near)     # the surface shows
    return here, faded(site, here, np.clip(full, 0, 1), alpha, least=0.5)


def scratch(site: Site) -> tuple[Window, np.ndarray]:
    """A thin bent line that tapers off, sometimes with a rim of the opposite tone; or a jagged line like a crack."""
    rng, side = site.rng, site.picture.side
    length = side * np.exp(rng.uniform(np.log(0.08), np.log(0.4)))
    width = max(1.2, np.clip(site.area / length, 0.005 * side, 0.016 * side))
    num_points, jagged = int(rng.integers(6, 11)), rng.uniform() < 0.35
    heading = rng.uniform(0, 2 * np.pi) + (rng.normal(0, 0.6, num_points) if jagged
                                           else np.cumsum(rng.normal(0, 0.15, num_points)))
    points = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0) * length / num_points
    points = points - points[num_points // 2]
    halves = width / 2 * np.clip(np.sin(np.linspace(0.15, np.pi - 0.15, num_points)) * 1.6, 0, 1)
    halves = halves * (rng.uniform(0.5, 1.2, num_points) if jagged else 1)
    here = window(site, np.abs(points).max() + width + 3)
    alpha = here.cover * coverage(polyline(here.x, here.y, points, halves), 1.0)
    near = mean_colour(here.pixels, alpha)
    colour = tone(near, site.contrast, site)
    pixels = here.pixels
    if not jagged and rng.uniform() < 0.5:
        away = polyline(here.x, here.y, points + rng.normal(0, 0.7, 2) * width, halves)
        pixels = lay(pixels, np.clip(here.pixels - 0.7 * (colour - near), 0, 1), here.cover * coverage(away, 1.0))
    return here, lay(pixels, colour, alpha)


# The surface itself, displaced or blurred.

def warp(site: Site) -> tuple[Window, np.ndarray]:
    """The surface shifted, bulged, pinched or turned within an ellipse, less and less towards its outline."""
    rng = site.rng
    stretch, radius = np.exp(rng.uniform(0, 0.4)), 1.1 * (site.area / np.pi) ** 0.5     # little happens at the outline
    here = window(site, stretch * radius + 3)
    u, v = turned(here.x, here.y, (0, 0), rng.uniform(0, np.pi))
    bump = np.clip(1 - (u / stretch) ** 2 / radius ** 2 - (v * stretch) ** 2 / radius ** 2, 0, 1) ** 2
    strength = rng.uniform(0.25, 0.6)       # the slope of the bump is below 1.6 / radius: nothing is folded over
    how = rng.integers(3)
    if how == 0:
        angle = rng.uniform(0, 2 * np.pi)
        dy, dx = (strength * radius / stretch * bump * part for part in (np.sin(angle), np.cos(angle)))
    elif how == 1:
        sign = rng.choice([-1, 1])
        dy, dx = sign * strength * bump * here.y, sign * strength * bump * here.x
    else:
        angle = 2.5 * strength * bump * rng.choice([-1, 1])
        dy = np.cos(angle) * here.y + np.sin(angle) * here.x - here.y
        dx = np.cos(angle) * here.x - np.sin(angle) * here.y - here.x
    moved = sampled(site.picture.pixels, here.y + dy + site.at[0], here.x + dx + site.at[1])
    return here, lay(here.pixels, moved, (bump > 0) * np.minimum(1, 8 * bump) * here.cover)


def blur(site: Site) -> tuple[Window, np.ndarray]:
    """The surface blurred, as if out of focus or worn."""
    here, alpha = blob(site)
    sigma = max(0.8, site.rng.uniform(0.1, 0.4) * site.area ** 0.5)
    margin = int(np.ceil(2 * sigma))
    wide = tuple(slice(max(0, part.start - margin), part.stop + margin) for part in here.box)
    soft = ndimage.gaussian_filter(site.picture.pixels[wide], (sigma, sigma, 0), mode="nearest", truncate=2.5)
    inner = tuple(slice(part.start - outer.start, part.stop - outer.start)
                  for part, outer in zip(here.box, wide, strict=True))
    return here, lay(here.pixels, soft[inner], alpha)


KINDS: dict[str, Callable[[Site], tuple[Window, np.ndarray]]] = {
    kind.__name__: kind for kind in (
        cut_paste, poisson_paste, scar, scratch, texture, stain, spots, missing, warp, blur)}
