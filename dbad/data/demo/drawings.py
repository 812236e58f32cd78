"""The pictures of the built-in demo data: hazelnuts, carpet and circuit boards, with and without a defect.

Every picture is a scene in units of half the frame (x to the right, y down, both in [-1, 1]), sampled at the pixel
centres. Edges are anti-aliased (`dbad.shapes`), so the same scene can be drawn at any size.
A picture function takes `(size, rng, flaw)` and returns

    image   the picture                                  (S, S, 3) float32, about [0, 1]
    cover   how much of a pixel the defect covers        (S, S) float32 in [0, 1]; all 0 without a defect

The good scene follows from `rng` alone and the defect from `flaw.rng` alone, so that the same scene can be drawn with
and without its defect; the two pictures are the same wherever `cover` is 0.
"""
from dataclasses import dataclass

import numpy as np

from dbad.shapes import (
    blend,
    blob,
    coverage,
    exposed,
    grid,
    mixed,
    polyline,
    rounded_box,
    smoothstep,
    turned,
    waves,
    window,
)

CATEGORIES = {
    "hazelnut": ("crack", "hole", "print"),
    "carpet": ("color", "cut", "thread"),
    "pcb": ("loose_part", "missing_part", "solder"),
}


@dataclass(frozen=True)
class Flaw:
    """The defect to draw into a scene."""
    kind: str
    rng: np.random.Generator
    span: float | None = None       # its diameter in scene units; None: the natural size of its kind

    def size(self, low, high):
        """The diameter to draw: `span`, or its natural size between `low` and `high`, in scene units."""
        natural = self.rng.uniform(low, high)
        return natural if self.span is None else self.span

    def width(self, length, low, high):
        """The width of a long defect; where a `span` is forced, wide enough to be seen at that length."""
        ratio = self.rng.uniform(low, high)
        return length * (ratio if self.span is None else max(ratio, 0.3))


# Hazelnut: one object in any pose on a dark ground.

def hazelnut(size, rng, flaw):
    """A hazelnut that lies on a dark ground, lit from one side."""
    x, y, pixel = grid(size)
    centre, angle, radius = rng.uniform(-0.17, 0.17, 2), rng.uniform(0, 6.28), rng.uniform(0.58, 0.74)
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
    lit = matte + shine[..., None].astype(np.float32) * np.float32([1, 0.96, 0.9])
    if flaw is not None:
        cover = nut * nut_flaw(lit, flaw, x, y, pixel, centre, angle, radius, glint, diffuse)
    blend(image, lit, nut)
    return exposed(image, rng, x, y, (0.86, 1.12), 0.12), cover


def nut_flaw(lit, flaw, x, y, pixel, centre, angle, radius, glint, diffuse):
    """Paint a crack, a hole or a print on the shell, off the cap and away from the shine; gives its coverage."""
    rng = flaw.rng
    spots = np.stack([rng.uniform(-0.35, 0.35, 12), rng.uniform(-0.15, 0.4, 12)], axis=1)        # (12, 2) on the nut
    cos, sin = np.cos(angle), np.sin(angle)
    seen = spots @ np.array([[cos, sin], [-sin, cos]])                                          # turned into the frame
    best = np.argmax(np.hypot(*(seen - glint).T)) if flaw.kind == "print" else 0
    x, y = turned(x, y, centre + radius * seen[best], rng.uniform(0, 6.28))
    if flaw.kind == "hole":
        half = flaw.size(0.22, 0.34) / 2
        distance = blob(x, y, half, rng, 0.07)
        cover = coverage(distance, pixel)
        blend(lit, np.float32([0.46, 0.33, 0.2]) * diffuse[..., None], cover)                   # the gnawed rim
        blend(lit, (0.05, 0.035, 0.03), coverage(distance + 0.22 * half, pixel))
    elif flaw.kind == "crack":
        length = flaw.size(0.75, 1.1)
        width = flaw.width(length, 0.1, 0.13)
        along = np.linspace(-0.5, 0.5, 7) * length
        points = np.stack([along, length * 0.07 * rng.standard_normal(7)], axis=1)
        halves = width / 2 * np.array([0.2, 0.75, 1, 1, 1, 0.75, 0.2])
        distance = polyline(x, y, points, halves)
        cover = coverage(distance, pixel)
        blend(lit, np.float32([0.30, 0.19, 0.11]) * diffuse[..., None], cover)
        blend(lit, (0.04, 0.03, 0.025), coverage(distance + 0.12 * width, pixel))
    else:
        height = flaw.size(0.42, 0.56)
        stroke = flaw.width(height, 0.16, 0.19) if flaw.span is None else 0.2 * height
        glyph = GLYPHS[rng.integers(len(GLYPHS))]
        distance = np.min([polyline(x, y, np.array(line) * (height - stroke) / 2, [stroke / 2] * len(line))
                           for line in glyph], axis=0)
        cover = coverage(distance, pixel)
        blend(lit, np.float32([0.93, 0.87, 0.76]) * (0.25 + 0.75 * diffuse[..., None]), cover)
    return cover


GLYPHS = (      # letters as strokes in a box of half height 1
    (((-0.7, -1), (-0.7, 1)), ((0.7, -1), (0.7, 1)), ((-0.7, 0), (0.7, 0))),
    (((-0.6, -1), (-0.6, 1)), ((0.7, -1), (-0.6, 0.1), (0.7, 1))),
    (((-0.8, 1), (0, -1), (0.8, 1)), ((-0.45, 0.3), (0.45, 0.3))),
    (((-0.7, 1), (-0.7, -1), (0.7, 1), (0.7, -1)),),
    (((-0.7, -1), (0.7, -1), (-0.7, 1), (0.7, 1)),),
    (((0.6, -1), (-0.6, -1), (-0.6, 1), (0.6, 1)), ((-0.6, 0), (0.4, 0))),
)


# Carpet: a woven texture that fills the frame.

def carpet(size, rng, flaw):
    """A plain weave of thick yarn; every fifth yarn is lighter."""
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

    # Two colours of yarn, from slate to sand from carpet to carpet, and the lighter fifth yarn.
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
    """Paint a stain, a slit or a loose thread on the carpet; gives its coverage."""
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


# Printed circuit board: parts in their places.

@dataclass(frozen=True)
class Part:
    """A part on the board: what it is, its centre and half sizes in board units, its angle in radians."""
    kind: str
    at: tuple[float, float]
    half: tuple[float, float]
    angle: float = 0.0


PARTS = (
    Part("chip", (-0.30, -0.42), (0.27, 0.25)),
    Part("chip", (0.38, 0.40), (0.20, 0.17), np.pi / 2),
    Part("can", (0.60, -0.58), (0.19, 0.19)),
    Part("can", (0.22, -0.62), (0.14, 0.14)),
    Part("resistor", (-0.70, 0.12), (0.175, 0.10)),
    Part("resistor", (-0.70, 0.37), (0.175, 0.10)),
    Part("capacitor", (-0.30, 0.12), (0.175, 0.10)),
    Part("capacitor", (-0.30, 0.37), (0.175, 0.10)),
    Part("resistor", (0.40, -0.10), (0.175, 0.10)),
    Part("capacitor", (0.74, 0.02), (0.175, 0.10), np.pi / 2),
    Part("capacitor", (0.06, 0.28), (0.175, 0.10), np.pi / 2),
    Part("led", (0.72, 0.74), (0.10, 0.10)),
)
BOARD = 0.94        # a board unit, in scene units
HEADER = Part("header", (-0.32, 0.74), (0.50, 0.095))
TRACES = (
    ((-0.62, -0.52), (-0.82, -0.52), (-0.82, 0.12)), ((-0.62, -0.32), (-0.74, -0.20), (-0.74, 0.05)),
    ((0.0, -0.36), (0.20, -0.36), (0.32, -0.22), (0.32, -0.10)), ((0.0, -0.50), (0.10, -0.62), (0.22, -0.62)),
    ((-0.16, 0.12), (-0.06, 0.12), (0.06, 0.16)), ((-0.44, 0.12), (-0.58, 0.12)), ((-0.44, 0.37), (-0.58, 0.37)),
    ((0.54, -0.10), (0.74, -0.10)), ((0.74, 0.16), (0.74, 0.28), (0.56, 0.30)), ((0.60, -0.40), (0.54, -0.14)),
    ((-0.64, 0.74), (-0.64, 0.50)), ((-0.20, 0.74), (-0.20, 0.52), (0.06, 0.42)), ((0.1, 0.74), (0.22, 0.66)),
)


def pcb(size, rng, flaw):
    """A green board with chips, resistors, capacitors, a light and a row of pins."""
    x, y, pixel = grid(size)
    shift, angle = rng.uniform(-0.035, 0.035, 2), rng.uniform(-0.035, 0.035)
    bx, by = turned(x / BOARD, y / BOARD, shift / BOARD, angle)
    onto_frame = BOARD * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    pixel = pixel / BOARD
    metal = np.float32([0.80, 0.80, 0.78]) * rng.uniform(0.8, 1.15)
    image = bare_board(x, bx, by, pixel, rng)

    missing = None
    if flaw is not None and flaw.kind == "missing_part":
        missing = flaw.rng.integers(len(PARTS))
    cover = np.zeros_like(x)
    for number, part in enumerate((*PARTS, HEADER)):
        place, turn = part.at + rng.uniform(-0.014, 0.014, 2), part.angle + rng.uniform(-0.03, 0.03)
        here = window(size, shift + place @ onto_frame, np.hypot(*part.half) + 0.06)   # nothing is drawn beyond
        px, py = turned(bx[here], by[here], place, turn)
        pads(image[here], part, px, py, pixel)
        bare = image[here].copy()
        drawn = mount(image[here], part, px, py, pixel, metal, rng)
        if number == missing:
            gone = np.ones_like(px)
            if flaw.span is not None:                                                            # only a piece of it
                gone = coverage(blob(px - part.half[0] * 0.4, py, flaw.span / 2, flaw.rng), pixel)
            blend(image[here], bare, gone * (drawn > 0))
            cover[here] = gone * drawn
    if flaw is not None and missing is None:
        cover = board_flaw(image, flaw, bx, by, pixel, metal)

    spot = rng.uniform(-1, 1, 2)                                                                 # a lamp's soft glare
    glare = rng.uniform(0, 0.38) * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 0.35)
    image += glare[..., None].astype(np.float32) * (1 - 0.5 * image)
    return exposed(image, rng, x, y, (0.80, 1.18), 0.15), cover


def bare_board(x, bx, by, pixel, rng):
    """The board on a grey ground, with traces and a hole in each corner, but without parts."""
    image = np.empty((*x.shape, 3), np.float32)
    image[:] = mixed(rng, (0.13, 0.13, 0.14), (0.19, 0.19, 0.18))
    green = mixed(rng, (0.04, 0.30, 0.16), (0.10, 0.42, 0.24)) * rng.uniform(0.9, 1.1)
    blend(image, green, coverage(rounded_box(bx, by, 0.95, 0.95, 0.08), pixel))
    nearest = np.min([polyline(bx, by, trace, [0.016] * len(trace)) for trace in TRACES], axis=0)
    blend(image, green * 1.35 + 0.03, coverage(nearest, pixel))
    away = np.hypot(np.abs(bx) - 0.85, np.abs(by) - 0.85)
    blend(image, (0.78, 0.62, 0.30), coverage(away - 0.07, pixel))
    blend(image, (0.06, 0.06, 0.06), coverage(away - 0.04, pixel))
    return image


def pads(image, part, x, y, pixel):
    """What is soldered or printed on the board below a part, and stays when the part is missing."""
    wide, high = part.half
    gold, ink = np.float32([0.86, 0.68, 0.32]), np.float32([0.78, 0.83, 0.80])
    if part.kind in ("resistor", "capacitor"):
        blend(image, gold, coverage(np.hypot(np.abs(x) - wide * 0.55, y) - high * 0.4, pixel))
    elif part.kind == "chip":
        blend(image, ink, coverage(np.abs(rounded_box(x, y, wide * 0.6, high * 0.9)) - 0.012, pixel))
        blend(image, gold, coverage(chip_pins(x, y, wide, high, 0.3), pixel))
    elif part.kind in ("can", "led"):
        blend(image, ink, coverage(np.abs(np.hypot(x, y) - wide * 0.85) - 0.013, pixel))
        blend(image, gold, coverage(np.hypot(np.abs(x) - wide * 0.42, y) - wide * 0.25, pixel))


def chip_pins(x, y, wide, high, thickness):
    """Signed distance (nearly) to five pins on either side of a chip."""
    pitch = 2 * high / 5
    row = np.abs((y + high) % pitch - pitch / 2) - pitch * thickness
    return np.maximum(np.maximum(rounded_box(x, y, wide, high - 0.01), row), wide * 0.65 - np.abs(x))


def mount(image, part, x, y, pixel, metal, rng):
    """Paint a part with its shadow, in the part's own coordinates; gives its coverage."""
    wide, high = part.half
    if part.kind == "chip":
        return mount_chip(image, x, y, wide, high, pixel, metal, rng)
    drop = min(wide, high, 0.1)
    away, sx, sy = np.hypot(x, y), x - 0.15 * drop, y - 0.25 * drop
    if part.kind in ("can", "led"):
        body, shadow = away - wide, np.hypot(sx, sy) - wide
    else:
        body, shadow = rounded_box(x, y, wide, high, 0.2 * drop), rounded_box(sx, sy, wide, high, 0.2 * drop)
    cover, inside = coverage(np.minimum(body, shadow), pixel), coverage(body, pixel)
    blend(image, (0.02, 0.08, 0.05), cover)
    if part.kind == "can":
        sleeves = (((0.10, 0.12, 0.20), (0.85, 0.72, 0.35)), ((0.12, 0.16, 0.36), (0.62, 0.66, 0.74)))
        blend(image, mixed(rng, *sleeves[rng.integers(2)]), inside)
        blend(image, metal * rng.uniform(0.85, 1.2), coverage(away - wide * 0.74, pixel))
        cx, cy = turned(x, y, (0, 0), rng.uniform(0, 6.28))
        cross = np.maximum(np.minimum(np.abs(cx), np.abs(cy)) - 0.012, away - wide * 0.5)
        blend(image, metal * 0.55, coverage(cross, pixel))
    elif part.kind == "led":
        lens = np.float32(((0.85, 0.18, 0.14), (0.90, 0.78, 0.25), (0.88, 0.90, 0.86))[rng.integers(3)])
        blend(image, lens * (1.05 - 0.5 * np.clip(away / wide, 0, 1))[..., None], inside)
        blend(image, (1, 1, 1), 0.8 * coverage(np.hypot(x + 0.03, y + 0.035) - 0.03, pixel))
    elif part.kind == "header":
        blend(image, (0.10, 0.10, 0.11), inside)
        column = (x + wide) % (wide / 3) - wide / 6                                              # six pins
        pin = np.maximum(rounded_box(column, y, 0.05, 0.05, 0.01), body)
        blend(image, np.float32([0.88, 0.72, 0.34]) * rng.uniform(0.75, 1.1), coverage(pin, pixel))
    else:
        blend(image, metal, inside)
        tones = {"resistor": ((0.08, 0.08, 0.10), (0.16, 0.16, 0.18)),
                 "capacitor": ((0.58, 0.42, 0.26), (0.80, 0.68, 0.48))}
        blend(image, mixed(rng, *tones[part.kind]), coverage(np.maximum(body, np.abs(x) - wide * 0.62), pixel))
        if part.kind == "resistor":
            blend(image, (0.8, 0.8, 0.8), 0.7 * coverage(rounded_box(x, y, wide * 0.35, high * 0.18), pixel))
    return cover


def mount_chip(image, x, y, wide, high, pixel, metal, rng):
    """Paint a chip with its pins, one or two lines of print and the dot at its first pin; gives its coverage."""
    pins = chip_pins(x, y, wide, high, 0.27)
    core = rounded_box(x, y, wide - 0.065, high, 0.02)
    blend(image, metal, coverage(pins, pixel))
    blend(image, mixed(rng, (0.07, 0.07, 0.08), (0.17, 0.17, 0.18)), coverage(core, pixel))
    ink, length = mixed(rng, (0.55, 0.55, 0.55), (0.95, 0.95, 0.92)), rng.uniform(0.4, 1) * (wide - 0.12)
    for line in (-0.25 * high, 0.25 * high)[:rng.integers(1, 3)]:
        blend(image, ink, 0.8 * coverage(rounded_box(x, y - line, length, 0.03), pixel))
    blend(image, (0.4, 0.4, 0.4), coverage(np.hypot(x + wide - 0.13, y + high - 0.06) - 0.025, pixel))
    return coverage(np.minimum(pins, core), pixel)


def board_flaw(image, flaw, bx, by, pixel, metal):
    """Paint a loose part or a lump of solder on the board; gives its coverage."""
    rng = flaw.rng
    if flaw.kind == "loose_part":
        long = flaw.size(0.34, 0.42) / 2
        part = Part(("resistor", "capacitor")[rng.integers(2)], tuple(rng.uniform(-0.65, 0.65, 2)), (long, 0.55 * long))
        quarter = rng.integers(4) * np.pi / 2
        x, y = turned(bx, by, part.at, quarter + rng.uniform(0.45, 1.12))                        # at an odd angle
        return mount(image, part, x, y, pixel, metal, rng)
    chip = PARTS[rng.integers(2)]
    x, y = turned(bx, by, chip.at, chip.angle)
    side = rng.choice([-1, 1])
    x, y = x - side * (chip.half[0] - 0.03), y - rng.uniform(-0.6, 0.6) * chip.half[1]
    half = flaw.size(0.26, 0.36) / 2
    distance = blob(x * 1.35, y, half, rng, 0.1)
    cover = coverage(distance, pixel)
    depth = np.clip(-distance / half, 0, 1)
    blend(image, metal * (0.55 + 0.4 * np.sqrt(depth))[..., None], cover)
    blend(image, (1, 1, 1), 0.8 * coverage(np.hypot(x + 0.25 * half, y + 0.3 * half) - 0.18 * half, pixel))
    return cover
