"""Hazelnuts: one object in any pose on a dark ground, with a crack, a hole or a print on the shell."""
from typing import NamedTuple

import numpy as np

from dbad.shapes import blend, blob, coverage, exposed, grid, mixed, polyline, smoothstep, turned, waves


class Pose(NamedTuple):
    """The pose of the nut: its centre (2,) and radius in scene units, and the angle of its tip in radians."""
    centre: np.ndarray
    angle: float
    radius: float


def hazelnut(size, rng, flaw):
    """A picture of a hazelnut on a dark ground, lit from one side."""
    x, y, pixel = grid(size)
    pose = Pose(rng.uniform(-0.17, 0.17, 2), rng.uniform(0, 6.28), rng.uniform(0.58, 0.74))
    centre, angle, radius = pose
    u, v = turned(x, y, centre, angle)
    u, v = u / radius, v / radius
    u = u / (rng.uniform(0.82, 0.97) * (1 - rng.uniform(0.04, 0.2) * np.clip(v, -1.2, 1.2)))      # slimmer at the tip
    polar, rho = np.arctan2(u, v), np.hypot(u, v)
    for order in (2, 3, 4):
        rho = rho * (1 + rng.uniform(0, 0.02) * np.cos(order * polar + rng.uniform(0, 6.28)))
    rho = rho - rng.uniform(0.03, 0.09) * np.exp(-(polar / 0.22) ** 2)                           # the tip, at v = 1
    nut = coverage((rho - 1) * radius * 0.9, pixel)

    # Light falls from a random side; (nx, ny, nz) is the normal of the rounded surface.
    azimuth, slant = rng.uniform(0, 6.28), rng.uniform(0.5, 0.95)
    lx, ly, lz = np.sin(slant) * np.cos(azimuth), np.sin(slant) * np.sin(azimuth), np.cos(slant)
    nz = np.sqrt(np.clip(1 - rho * rho, 0, 1))
    nx, ny = np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v
    ambient = rng.uniform(0.38, 0.5)
    diffuse = ambient + (1 - ambient) * np.clip(nx * lx + ny * ly + nz * lz, 0, 1)
    glint = np.sin(slant / 2) * np.array([np.cos(azimuth), np.sin(azimuth)])                     # where it shines
    away = (nx - glint[0]) ** 2 + (ny - glint[1]) ** 2
    shine = rng.uniform(0.35, 0.85) * np.exp(-away / rng.uniform(0.02, 0.07))

    # Shell with fine stripes from cap to tip, and the matte, lighter cap at the other end.
    shell = mixed(rng, (0.52, 0.27, 0.12), (0.74, 0.47, 0.24)) * rng.uniform(0.88, 1.12)
    longitude = np.arcsin(np.clip(u / np.sqrt(np.clip(1 - v * v, 0.05, 1)), -1, 1))
    roll = rng.uniform(0, 6.28)
    stripes = np.cos(13 * longitude + roll) + 0.6 * np.cos(31 * longitude + 2 * roll)
    tone = 1 + 0.055 * stripes * (1 - 0.5 * rho) + 0.03 * waves(u, v, rng, 0.6)
    colour = shell.astype(np.float32) * tone[..., None]
    cap_at = rng.uniform(0.5, 0.68)
    ragged = 0.2 * u * u - 0.025 * np.cos(9 * longitude + roll)
    cap = smoothstep(-0.03, 0.05, -(v + cap_at) - ragged + 0.06)
    pale = mixed(rng, (0.70, 0.55, 0.36), (0.84, 0.72, 0.52))
    blend(colour, pale * (1 + 0.05 * waves(u, v, rng, 0.16)[..., None]), cap)
    shine = shine * (1 - 0.85 * cap)

    ground = mixed(rng, (0.05, 0.05, 0.06), (0.13, 0.12, 0.12)) * (1 + 0.06 * waves(x, y, rng, 1.5)[..., None])
    shadow = np.hypot(x - centre[0] + 0.14 * lx, y - centre[1] + 0.14 * ly) - radius
    image = (ground * (0.35 + 0.65 * smoothstep(-0.1, 0.25, shadow))[..., None]).astype(np.float32)
    cover = np.zeros_like(x)
    matte = (colour * diffuse[..., None]).astype(np.float32)
    lit = matte + shine[..., None].astype(np.float32) * np.array([1, 0.96, 0.9], np.float32)
    if flaw is not None:
        cover = nut * nut_flaw(lit, flaw, x, y, pixel, pose, glint, diffuse)
    blend(image, lit, nut)
    return exposed(image, rng, x, y, (0.86, 1.12), 0.12), cover


def nut_flaw(lit, flaw, x, y, pixel, pose, glint, diffuse):
    """Paint a crack, a hole or a print on the shell, off the cap and away from the shine; returns its coverage."""
    rng = flaw.rng
    spots = np.stack([rng.uniform(-0.35, 0.35, 12), rng.uniform(-0.15, 0.4, 12)], axis=1)        # (12, 2) on the nut
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    seen = spots @ np.array([[cos, sin], [-sin, cos]])                                          # turned into the frame
    best = np.argmax(np.hypot(*(seen - glint).T)) if flaw.kind == "print" else 0
    x, y = turned(x, y, pose.centre + pose.radius * seen[best], rng.uniform(0, 6.28))
    if flaw.kind == "hole":
        half = flaw.size(0.22, 0.34) / 2
        distance = blob(x, y, half, rng, 0.07)
        cover = coverage(distance, pixel)
        blend(lit, np.array([0.46, 0.33, 0.2], np.float32) * diffuse[..., None], cover)             # the gnawed rim
        blend(lit, (0.05, 0.035, 0.03), coverage(distance + 0.22 * half, pixel))
    elif flaw.kind == "crack":
        length = flaw.size(0.75, 1.1)
        width = flaw.width(length, 0.1, 0.13)
        along = np.linspace(-0.5, 0.5, 7) * length
        points = np.stack([along, length * 0.07 * rng.standard_normal(7)], axis=1)
        halves = width / 2 * np.array([0.2, 0.75, 1, 1, 1, 0.75, 0.2])
        distance = polyline(x, y, points, halves)
        cover = coverage(distance, pixel)
        blend(lit, np.array([0.30, 0.19, 0.11], np.float32) * diffuse[..., None], cover)
        blend(lit, (0.04, 0.03, 0.025), coverage(distance + 0.12 * width, pixel))
    else:
        height = flaw.size(0.42, 0.56)
        stroke = flaw.width(height, 0.16, 0.19) if flaw.span is None else 0.2 * height
        glyph = GLYPHS[rng.integers(len(GLYPHS))]
        distance = np.min([polyline(x, y, np.array(line) * (height - stroke) / 2, [stroke / 2] * len(line))
                           for line in glyph], axis=0)
        cover = coverage(distance, pixel)
        blend(lit, np.array([0.93, 0.87, 0.76], np.float32) * (0.25 + 0.75 * diffuse[..., None]), cover)
    return cover


GLYPHS = (      # letters as strokes in a box of half height 1
    (((-0.7, -1), (-0.7, 1)), ((0.7, -1), (0.7, 1)), ((-0.7, 0), (0.7, 0))),
    (((-0.6, -1), (-0.6, 1)), ((0.7, -1), (-0.6, 0.1), (0.7, 1))),
    (((-0.8, 1), (0, -1), (0.8, 1)), ((-0.45, 0.3), (0.45, 0.3))),
    (((-0.7, 1), (-0.7, -1), (0.7, 1), (0.7, -1)),),
    (((-0.7, -1), (0.7, -1), (-0.7, 1), (0.7, 1)),),
    (((0.6, -1), (-0.6, -1), (-0.6, 1), (0.6, 1)), ((-0.6, 0), (0.4, 0))),
)
