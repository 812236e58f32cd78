"""Printed circuit boards with parts in their places; a defect is a missing part, a loose part or a lump of solder."""
from dataclasses import dataclass

import numpy as np

from dbad.shapes import blend, blob, coverage, exposed, grid, mixed, polyline, rounded_box, turned, window


@dataclass(frozen=True)
class Part:
    """A part on the board: its kind, its centre and half sizes in board units, its angle in radians."""
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
    """A picture of a green board with chips, resistors, capacitors, a light and a row of pins."""
    x, y, pixel = grid(size)
    shift, angle = rng.uniform(-0.035, 0.035, 2), rng.uniform(-0.035, 0.035)
    bx, by = turned(x / BOARD, y / BOARD, shift / BOARD, angle)
    onto_frame = BOARD * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    pixel = pixel / BOARD
    metal = np.array([0.80, 0.80, 0.78], np.float32) * rng.uniform(0.8, 1.15)
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
    """A picture of the board on a grey ground, with traces and a hole in each corner, but without parts."""
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
    """Paint the solder and the print below a part, which remain visible when the part is missing."""
    wide, high = part.half
    gold, ink = np.array([0.86, 0.68, 0.32], np.float32), np.array([0.78, 0.83, 0.80], np.float32)
    if part.kind in ("resistor", "capacitor"):
        blend(image, gold, coverage(np.hypot(np.abs(x) - wide * 0.55, y) - high * 0.4, pixel))
    elif part.kind == "chip":
        blend(image, ink, coverage(np.abs(rounded_box(x, y, wide * 0.6, high * 0.9)) - 0.012, pixel))
        blend(image, gold, coverage(chip_pins(x, y, wide, high, 0.3), pixel))
    elif part.kind in ("can", "led"):
        blend(image, ink, coverage(np.abs(np.hypot(x, y) - wide * 0.85) - 0.013, pixel))
        blend(image, gold, coverage(np.hypot(np.abs(x) - wide * 0.42, y) - wide * 0.25, pixel))


def chip_pins(x, y, wide, high, thickness):
    """Approximate signed distance to five pins on either side of a chip."""
    pitch = 2 * high / 5
    row = np.abs((y + high) % pitch - pitch / 2) - pitch * thickness
    return np.maximum(np.maximum(rounded_box(x, y, wide, high - 0.01), row), wide * 0.65 - np.abs(x))


def mount(image, part, x, y, pixel, metal, rng):
    """Paint a part with its shadow, in the part's own coordinates; returns its coverage."""
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
        blend(image, np.array([0.88, 0.72, 0.34], np.float32) * rng.uniform(0.75, 1.1), coverage(pin, pixel))
    else:
        blend(image, metal, inside)
        tones = {"resistor": ((0.08, 0.08, 0.10), (0.16, 0.16, 0.18)),
                 "capacitor": ((0.58, 0.42, 0.26), (0.80, 0.68, 0.48))}
        blend(image, mixed(rng, *tones[part.kind]), coverage(np.maximum(body, np.abs(x) - wide * 0.62), pixel))
        if part.kind == "resistor":
            blend(image, (0.8, 0.8, 0.8), 0.7 * coverage(rounded_box(x, y, wide * 0.35, high * 0.18), pixel))
    return cover


def mount_chip(image, x, y, wide, high, pixel, metal, rng):
    """Paint a chip with its pins, one or two lines of print and the dot at its first pin; returns its coverage."""
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
    """Paint a loose part or a lump of solder on the board; returns its coverage."""
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
