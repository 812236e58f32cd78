"""The picture of a single image: a panel of all that is known of it, or an overlay of its map."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import maximum_filter

from dbad.files.atomic import atomic_write
from dbad.metrics.verdicts import Thresholds, decide, outcome
from dbad.records import Origin, Pictures, ScoreRow
from dbad.report.colours import heat, maps_of, overlay
from dbad.report.drawing import (
    BAR_HEIGHT,
    DEFECTIVE,
    INK,
    MUTED,
    OUTLINE,
    PAPER,
    draw_bar,
    font,
    outlined,
    shorten,
    tile,
)


def verdict(row: ScoreRow, image_threshold: float | None) -> tuple[str, tuple[int, int, int]]:
    """The decision and its outcome in words, and a colour that makes wrong decisions easy to find."""
    decision = decide(row, image_threshold)
    if decision is None:
        return "not calibrated", MUTED
    words = "called defective" if decision else "called good"
    result = outcome(row.label, decision)
    if result is None:
        return words, DEFECTIVE if decision else INK
    return f"{words}, {result}", INK if result == "correct" else DEFECTIVE


def panel(row: ScoreRow, pictures: Pictures, thresholds: Thresholds, scales: dict[str, float] | None = None,
          side: int = 256) -> Image.Image:
    """Everything known about one image, side by side: input, reconstruction, maps, decision, ground truth.

    `scales` comes from `map_scales`; a map that has none there is shown on the scale of its own maximum. A column that
    the detector or the data cannot fill is left out. Under each map is the bar of its colours; the middle is marked
    where the scale is that of a threshold. The decision has no outline if the image is called good. `side` is the
    longer side of a tile in pixels.
    """
    shown, scales = tile(pictures.image, side), scales or {}
    columns = {"input": shown}
    if pictures.reconstruction is not None:
        columns[pictures.counterpart] = tile(pictures.reconstruction, side)
    maps = maps_of(pictures)
    highest = {title: scales.get(title, float(values.max())) for title, values in maps.items()}
    columns |= {title: tile(heat(values, highest[title]), side) for title, values in maps.items()}
    if thresholds.pixel is not None:
        called = decide(row, thresholds.image) != 0
        columns["decision"] = outlined(shown, pictures.anomaly_map >= thresholds.pixel) if called else shown
    if pictures.mask is not None:
        columns["ground truth"] = tile(pictures.mask, side)

    margin, header, titles = 8, 26, 20
    width, height = shown.size
    sheet = Image.new("RGB", (margin + len(columns) * (width + margin),
                              header + titles + height + BAR_HEIGHT + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write_header(draw, row, thresholds.image, sheet.width - 2 * margin, margin)
    for number, (title, picture) in enumerate(columns.items()):
        left = margin + number * (width + margin)
        draw.text((left, header + 2), shorten(title, font(12), width), MUTED, font(12))
        sheet.paste(picture, (left, header + titles))
        if title in maps:
            draw_bar(sheet, (left, header + titles + height + 4), width, highest[title], title in scales)
    return sheet


def _write_header(draw: ImageDraw.ImageDraw, row: ScoreRow, image_threshold: float | None, width: int,
                  margin: int) -> None:
    """The line above a panel: path on the left; defect, score and verdict on the right."""
    limit = "" if image_threshold is None else f" (threshold {image_threshold:.4g})"
    words, colour = verdict(row, image_threshold)
    facts = [row.defect or "no ground truth", f"score {row.score:.4g}{limit}", words]
    line = shorten("   ".join(facts), font(13, True), width * 0.7)
    used = font(13, True).getlength(line)
    draw.text((margin + width - used, 7), line, colour, font(13, True))
    draw.text((margin, 7), shorten(row.path, font(13), width - used - 20), INK, font(13))


def write_panel(path: Path, row: ScoreRow, pictures: Pictures, thresholds: Thresholds,
                scales: dict[str, float] | None = None) -> None:
    """Write the `panel` of an image."""
    with atomic_write(path) as temporary:
        panel(row, pictures, thresholds, scales).save(temporary, "PNG", compress_level=1)


def panel_names(origins: Iterable[Origin | ScoreRow]) -> list[str]:
    """A file name for every image, `<defect>_<stem>.png`: safe on every system and unique, even if case is ignored.

    Characters other than letters, digits, dot, hyphen and underscore become an underscore; a name that occurs again
    gets a number. With several categories the category comes first.
    """
    origins = list(origins)
    several = len({origin.category for origin in origins}) > 1
    names, taken = [], set()
    for o in origins:
        words = ([o.category] if several else []) + [o.defect or "unknown", re.split(r"[\\/]", o.path)[-1]]
        words[-1] = words[-1].rpartition(".")[0] or words[-1]
        base = "_".join(re.sub(r"[^\w.-]", "_", word)[:60] for word in words).lstrip(".-")
        name, count = base, 1
        while name.casefold() in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def write_overlay(path: Path, original: Image.Image, anomaly_map: np.ndarray, pixel_threshold: float,
                  outline: bool = True) -> None:
    """Write the image at its own size, tinted by its map (H, W) near and above the pixel threshold.

    With `outline`, anomalous pixels have a contour. The highest colour stands for twice the pixel threshold, so that
    colours mean the same in every image and every run.
    """
    values = np.asarray(Image.fromarray(anomaly_map).resize(original.size, Image.Resampling.BILINEAR))
    pixels = np.array(original)
    for top in range(0, len(pixels), 256):      # in strips, since colours take 30 times the memory of the image
        rows = slice(top, top + 256)
        pixels[rows] = overlay(pixels[rows], values[rows], 2 * pixel_threshold)
    inside = values >= pixel_threshold
    if outline and inside.any():
        width = max(1, round(max(original.size) / 300))
        for reach, colour in ((width + width // 2, (0, 0, 0)), (width, OUTLINE)):
            near = maximum_filter(inside.view(np.uint8), 2 * reach + 1).view(bool)
            pixels[near & ~inside] = colour     # outside, so that small defects stay visible
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", compress_level=1)


def show(paths: Iterable[Path | str], seconds_each: float = 0.5) -> bool:
    """Show the pictures one after the other in one window, without waiting for input; True if there is a screen.

    Closing the window ends the show. Without a screen one line is printed.
    """
    try:
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(14, 3), layout="constrained")
        if figure.canvas.required_interactive_framework is None:  # matplotlib found no toolkit or no display
            pyplot.close(figure)
            raise RuntimeError("matplotlib can open no window here")
        for path in paths:
            if not pyplot.fignum_exists(figure.number):
                break
            axis.clear()
            axis.set_axis_off()
            axis.imshow(Image.open(path))
            if figure.canvas.manager:
                figure.canvas.manager.set_window_title(str(path))
            pyplot.pause(seconds_each)
        pyplot.close(figure)
    except Exception as error:  # each toolkit fails in its own way, and a window is never worth a failed run
        print(f"No screen for the pictures: {' '.join(str(error).split())}")
        return False
    return True
