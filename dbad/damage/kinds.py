"""The kinds of damage a pseudo-anomaly can show, each painted on a window of a good image.

A kind is a function from a `Site` to the `Window` it worked on and that window's new pixels; a pixel it leaves exactly
as it was does not belong to the anomaly. Pixels are (h, w, 3) float32 in [0, 1]; alpha, cover and distances are (h, w).
Lengths are in pixels, and sizes that a kind draws itself are shares of the image's side, so that a picture is damaged
alike at any resolution.

Sources: cutting, pasting and scars, CutPaste (arXiv:2104.04015); foreign texture behind thresholded Perlin noise, DRAEM
(arXiv:2108.07610); pasting by the Poisson equation, Perez et al., SIGGRAPH 2003, as NSA (arXiv:2109.15222) does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import splu

from dbad.shapes import coverage, polyline, rounded_box, turned


@dataclass(frozen=True)
class Picture:
    """A good image and where its object lies."""

    pixels: np.ndarray      # (H, W, 3)
    cover: np.ndarray       # (H, W) 1 on the object, falling to 0 within a few pixels around it
    inner: np.ndarray       # (H, W) bool, the object without what lies next to its outline
    places: np.ndarray      # (n,) flat indices of the object's pixels
    rim: np.ndarray         # (m,) those at the object's outline; m = 0 where it fills the frame
    gray: bool              # the three channels are equal

    @property
    def side(self) -> float:
        """The length that sizes are shares of: the side of a square of the same area."""
        return float(self.cover.size ** 0.5)

    def pick(self, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Row and column, (2,), of one of `places`."""
        return np.array(divmod(int(places[rng.integers(len(places))]), self.cover.shape[1]))


@dataclass(frozen=True)
class Site:
    """Where a good image is damaged, how much, and with what."""

    picture: Picture
    sources: Sequence[Picture]      # good images to cut from, in an order of their own
    at: np.ndarray                  # (2,) row and column of the centre
    area: float                     # pixels to change
    contrast: float                 # change of a changed pixel's most changed channel, where the kind can choose it
    rng: np.random.Generator


@dataclass(frozen=True)
class Window:
    """The part of a picture around a site's centre."""

    box: tuple[slice, slice]
    pixels: np.ndarray      # (h, w, 3), a view of the picture
    cover: np.ndarray       # (h, w), a view
    y: np.ndarray           # (h, w) offsets from the centre
    x: np.ndarray


def window(site: Site, reach: float) -> Window:
    """The pixels at most `reach` rows and columns from the centre; fewer at the picture's border."""
    reach = int(np.ceil(reach))
    low = np.maximum(site.at - reach, 0)
    high = np.minimum(site.at + reach + 1, site.picture.cover.shape)
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    y, x = np.mgrid[box].astype(np.float32)
    return Window(box, site.picture.pixels[box], site.picture.cover[box], y - site.at[0], x - site.at[1])


# ---------------------------------------------------------------------------------------- shapes and colours

def perlin(shape: tuple[int, int], cell: float, rng: np.random.Generator) -> np.ndarray:
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
    """A compact region of `site.area` pixels around the centre, and how opaque it is, alpha (h, w) in [0, 1].

    A turned ellipse or rounded box with a wavy outline, cut to the object; the pixels that are nearest in that shape's
    own distance belong to it, so that its area does not depend on where it lies.
        rough       how strongly Perlin noise frays the outline; 1 tears the region into islands
        softness    the edge is up to this share of the radius wide, at least one pixel
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
    # A wide edge lies inside, so that nothing beyond the level is touched but the pixels that it cuts.
    return trimmed(here, here.cover * coverage((distance - level) * radius / stretch + (edge - 1) / 2, edge))


def trimmed(here: Window, alpha: np.ndarray) -> tuple[Window, np.ndarray]:
    """The part of a window where alpha (h, w) is above 0, and three pixels around it."""
    box = tuple(slice(max(0, found.min() - 3), found.max() + 4) for found in np.nonzero(alpha > 0))
    box_of_picture = tuple(slice(outer.start + inner.start, outer.start + min(inner.stop, length))
                           for outer, inner, length in zip(here.box, box, alpha.shape, strict=True))
    return Window(box_of_picture, here.pixels[box], here.cover[box], here.y[box], here.x[box]), alpha[box]


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
    """Mean of pixels (h, w, 3) weighted by alpha, (3,)."""
    return np.einsum("hwc,hw->c", pixels, alpha) / max(alpha.sum(), 1e-6)


def lay(pixels: np.ndarray, full: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`full`, (h, w, 3) or a colour (3,), over the pixels; exactly the pixels where alpha is 0."""
    return np.where(alpha[..., None] > 0, pixels + alpha[..., None] * (full - pixels), pixels)


def faded(site: Site, here: Window, full: np.ndarray, alpha: np.ndarray, least: float) -> np.ndarray:
    """`full` over the window, so transparent that the mean change is the site's contrast; opacity from `least` to 1."""
    change = np.abs(full - here.pixels).max(axis=2)
    mean = (alpha * change).sum() / max(alpha.sum(), 1e-6)
    return lay(here.pixels, full, alpha * np.clip(site.contrast / max(mean, 1e-6), least, 1))


def cut(site: Site, here: Window, scale: float = 1.0) -> np.ndarray:
    """Pixels of the window's size from an object of a good image, turned and perhaps mirrored, `scale` times larger.

    Half the pieces are turned by right angles only and keep their pixels as they are.
    """
    rng = site.rng
    source = site.sources[rng.integers(len(site.sources))]
    centre = source.pick(source.places, rng)
    angle = rng.integers(4) * np.pi / 2 if rng.uniform() < 0.5 else rng.uniform(0, 2 * np.pi)
    x, y = turned(here.x * rng.choice([-1, 1]), here.y, (0, 0), angle)
    return sampled(source.pixels, centre[0] + y / scale, centre[1] + x / scale)


def sampled(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The picture at fractional positions (h, w), by cubic splines, mirrored beyond its border; (h, w, 3)."""
    at = np.stack([rows, columns])
    low = np.clip(np.floor(at.min(axis=(1, 2))).astype(int) - 6, 0, np.array(pixels.shape[:2]) - 1)
    high = np.clip(np.ceil(at.max(axis=(1, 2))).astype(int) + 7, 1, pixels.shape[:2])
    part = pixels[low[0]:high[0], low[1]:high[1]]           # splines are fitted to what is needed only
    at = at - low[:, None, None]
    return np.stack([ndimage.map_coordinates(part[..., c], at, order=3, mode="mirror") for c in range(3)], 2).clip(0, 1)


# ---------------------------------------------------------------------------------------- pieces of good images

def cut_paste(site: Site) -> tuple[Window, np.ndarray]:
    """A piece of a good image, with a feathered edge, in a light of its own."""
    here, alpha = blob(site)
    piece = cut(site, here, np.exp(site.rng.uniform(-0.3, 0.3))) * site.rng.uniform(0.75, 1.25)
    return here, faded(site, here, piece, alpha, least=0.6)


def poisson_paste(site: Site) -> tuple[Window, np.ndarray]:
    """A piece of a good image that takes on the colours around it and leaves no edge."""
    here, alpha = blob(site)
    piece = cut(site, here) * site.rng.uniform(0.8, 1.6)
    return here, solve_poisson(here.pixels, piece, within(site, here, alpha >= 0.5))


def within(site: Site, here: Window, region: np.ndarray) -> np.ndarray:
    """The region less what lies at the object's outline, where the background bleeds in; all of it if half would go."""
    left = region & site.picture.inner[here.box]
    return left if 2 * left.sum() > region.sum() else region


def solve_poisson(target: np.ndarray, guide: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The target (h, w, 3) with `region` (h, w) bool replaced by what has the guide's gradients and meets its border.

    Perez et al. 2003, Eq. 7: for every p of the region, with q its up to four neighbours in the window,
        sum_q (f_p - f_q) = sum_q (g_p - g_q),   f_q = target_q where q is not in the region.
    Where the guide is constant, this is Laplace's equation. Needs one pixel around each part of the region.
    """
    rows, columns = np.nonzero(region)
    index = np.full(region.shape, -1)
    index[rows, columns] = np.arange(len(rows))
    degree, right = np.zeros(len(rows)), np.zeros((len(rows), 3))
    pairs = []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        y, x = rows + dy, columns + dx
        there = np.flatnonzero((y >= 0) & (y < region.shape[0]) & (x >= 0) & (x < region.shape[1]))
        y, x, p = y[there], x[there], there
        degree[p] += 1
        right[p] += guide[rows[p], columns[p]] - guide[y, x]
        known = index[y, x] < 0
        right[p[known]] += target[y[known], x[known]]
        pairs.append((p[~known], index[y, x][~known]))
    p, q = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    matrix = sparse.coo_matrix((-np.ones(len(p)), (p, q)), (len(rows),) * 2) + sparse.diags(degree)
    solution = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(right)
    filled = target.copy()
    filled[rows, columns] = solution
    return filled


def missing(site: Site) -> tuple[Window, np.ndarray]:
    """A region filled from what surrounds it; at the object's rim also a bite, filled from the background alone."""
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
    sigma = min(0.03, float(np.median(np.abs(grain))) * 1.5)        # else the filling would be smoother than any photo
    return here, filled + np.float32(sigma) * region[..., None] * rng.standard_normal((*region.shape, 1))


# ---------------------------------------------------------------------------------------- foreign matter

def texture(site: Site) -> tuple[Window, np.ndarray]:
    """A foreign texture in frayed islands: stripes, checks or marble, or a good image that is hardly recognised."""
    here, alpha = blob(site, rough=site.rng.uniform(0.4, 1.2))
    return here, faded(site, here, foreign(site, here, mean_colour(here.pixels, alpha)), alpha, least=0.2)


def foreign(site: Site, here: Window, near: np.ndarray) -> np.ndarray:
    """A texture (h, w, 3) of the window's size, in tones of its own or in the distorted ones of a good image."""
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
    """A soft discolouration through which the surface is still seen, uneven, at times with a darker seam."""
    rng = site.rng
    here, alpha = blob(site, rough=rng.uniform(0, 0.5), softness=1.0)
    near = mean_colour(here.pixels, alpha)
    shift = tone(near, site.contrast, site) - near
    density = 1 + rng.uniform(0, 0.5) * perlin(alpha.shape, 0.3 * site.area ** 0.5, rng)
    if rng.uniform() < 0.4:
        density = density * (0.5 + 2 * alpha * (1 - alpha))
    darker = here.pixels * np.clip(near + shift, 0, 1) / np.maximum(near, 0.02)      # what absorbs light, does so
    changed = np.where(shift < 0, darker, here.pixels + shift)                       # in proportion
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


# ---------------------------------------------------------------------------------------- lines

def scar(site: Site) -> tuple[Window, np.ndarray]:
    """A thin straight strip: a piece of a good image in another light, or one flat tone."""
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
        full = tone(near, site.contrast, site) + rng.uniform(0.2, 1) * (here.pixels - near)      # keeps some surface
    return here, faded(site, here, np.clip(full, 0, 1), alpha, least=0.5)


def scratch(site: Site) -> tuple[Window, np.ndarray]:
    """A thin bent line that tapers off, at times with a rim of the opposite tone; or one that is jagged as a crack."""
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


# ---------------------------------------------------------------------------------------- what is there, displaced

def warp(site: Site) -> tuple[Window, np.ndarray]:
    """The surface shifted, bulged, pinched or turned within an ellipse, the less, the nearer to its outline."""
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
    """The surface out of focus or worn."""
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
