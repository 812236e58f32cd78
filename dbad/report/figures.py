"""The pictures of an evaluation run: a panel per image, an overview of the telling ones, and the curves.

Panels and overview are drawn with Pillow, which takes milliseconds where matplotlib takes a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dbad.files.atomic import atomic_write
from dbad.metrics.verdicts import (
    Curves,
    Thresholds,
    curves,
    decide,
    ground_truth,
    kinds,
    outcome,
    point_at,
    spans_decades,
)
from dbad.records import Inspection

INK, MUTED, PAPER, EMPTY = (27, 31, 36), (96, 105, 115), (255, 255, 255), (232, 235, 238)
GOOD, DEFECTIVE, UNKNOWN = (47, 111, 176), (200, 80, 30), (125, 131, 140)  # the same in panels, curves and report
OUTLINE = (255, 45, 130)  # stands out from wood, metal, textile and from the colours of the maps


# Maps as colours


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """The "turbo" colour map, (256, 3) uint8: blue is low, green the middle, red high."""
    from matplotlib import colormaps

    return (colormaps["turbo"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _strength(values: np.ndarray, scale: float) -> np.ndarray:
    """`values` / `scale`, limited to [0, 1], float32."""
    return np.clip(values / np.float32(scale), 0, 1) if scale > 0 else np.zeros(values.shape, np.float32)


def heat(values: np.ndarray, scale: float) -> np.ndarray:
    """A map (H, W) >= 0 as colours, (H, W, 3) uint8; `scale` is the value shown in the highest colour."""
    return _colours()[(_strength(values, scale) * 255).astype(np.uint8)]


def overlay(image: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The image, (H, W, 3) uint8, covered by the colours of the map (H, W) the more, the higher the map."""
    cover = 0.85 * _strength(values, scale)[..., None]
    return (image + cover * (heat(values, scale).astype(np.float32) - image)).astype(np.uint8)


def map_scales(inspections: Iterable[Inspection], pixel_threshold: float | None = None) -> dict[str, float]:
    """The value shown in the highest colour, for each kind of map, so that a colour means the same in a whole run.

    For the anomaly map it is twice the pixel threshold, so that green is where a defect begins. Where no threshold is
    known, and for the parts, it is the 75 % quantile of the images' highest values.
    """
    peaks: dict[str, list[float]] = {}
    for inspection in inspections:
        for title, values in _maps(inspection).items():
            peaks.setdefault(title, []).append(float(values.max()))
    scales = {title: float(np.quantile(values, 0.75)) for title, values in peaks.items()}
    if pixel_threshold is not None:
        scales["anomaly map"] = 2 * pixel_threshold
    return scales


def _maps(inspection: Inspection) -> dict[str, np.ndarray]:
    """All maps of an image by the title they are shown under, the parts first."""
    return {f"{name} map": part for name, part in inspection.parts.items()} | {"anomaly map": inspection.anomaly_map}


# Drawing


@lru_cache(maxsize=8)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and covers Latin, Greek and Cyrillic names."""
    from matplotlib import get_data_path
    path = Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(str(path), size)      # older versions of Pillow take no Path


def _shorten(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The end of `text` that fits into `width` pixels: of a path, the end tells most."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if face.getlength(text) <= width:
        return text
    while len(text) > 1 and face.getlength("…" + text) > width:
        text = text[max(1, len(text) // 40):]
    return "…" + text


def tile(pixels: np.ndarray, side: int, enlarge: bool = True) -> Image.Image:
    """An array (H, W, 3) uint8, or a bool mask (H, W), as a picture whose longer side is `side` pixels."""
    picture = Image.fromarray(pixels if pixels.ndim == 3 else pixels * np.uint8(255))
    factor = side / max(picture.size)
    if factor == 1 or (factor > 1 and not enlarge):
        return picture
    size = tuple(max(1, round(length * factor)) for length in picture.size)
    smooth = pixels.ndim == 3 and factor < 1  # enlarged pixels stay visible as what they are
    return picture.resize(size, Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)


def outlined(picture: Image.Image, region: np.ndarray) -> Image.Image:
    """The picture with the border of `region`, a bool array of any resolution: two bright pixels, one black inside."""
    inside = np.asarray(Image.fromarray(region).resize(picture.size, Image.Resampling.NEAREST))
    pixels = np.array(picture)
    for width, colour in ((3, (0, 0, 0)), (2, OUTLINE)):
        pixels[inside & ~_shrunk(inside, width)] = colour
    return Image.fromarray(pixels)


def _shrunk(inside: np.ndarray, width: int) -> np.ndarray:
    """A bool region (H, W) less its outermost `width` pixels; what lies at the border of the picture ends there."""
    padded = np.pad(inside, width)
    height, length = inside.shape
    across = [padded[width:width + height, shift:shift + length] for shift in (0, 2 * width)]
    down = [padded[shift:shift + height, width:width + length] for shift in (0, 2 * width)]
    return inside & across[0] & across[1] & down[0] & down[1]


def _verdict(inspection: Inspection, image_threshold: float | None) -> tuple[str, tuple[int, int, int]]:
    """What was decided and whether that was right, in words, and a colour that makes wrong decisions easy to find."""
    decision = decide(inspection, image_threshold)
    if decision is None:
        return "not calibrated", MUTED
    words = "called defective" if decision else "called good"
    result = outcome(inspection.label, decision)
    if result is None:
        return words, DEFECTIVE if decision else INK
    return f"{words}, {result}", INK if result == "correct" else DEFECTIVE


def panel(inspection: Inspection, pixel_threshold: float | None = None, image_threshold: float | None = None,
          scales: dict[str, float] | None = None, side: int = 256) -> Image.Image:
    """Everything known about one image, side by side: input, reconstruction, maps, decision, ground truth.

    `scales` comes from `map_scales` and defaults to the image's own maxima. A column that the detector or the data
    cannot fill is left out. `side` is the longer side of a tile in pixels.
    """
    scales = scales if scales is not None else {title: float(m.max()) for title, m in _maps(inspection).items()}
    shown = tile(inspection.image, side)
    columns = {"input": shown}
    if inspection.reconstruction is not None:
        columns[inspection.counterpart] = tile(inspection.reconstruction, side)
    for title, values in _maps(inspection).items():
        columns[title] = tile(heat(values, scales[title]), side)
    if pixel_threshold is not None:
        columns["decision"] = outlined(shown, inspection.anomaly_map >= pixel_threshold)
    truth = ground_truth(inspection)
    if truth is not None:
        columns["ground truth"] = tile(truth, side)

    margin, header, titles = 8, 26, 20
    width, height = shown.size
    sheet = Image.new("RGB", (margin + len(columns) * (width + margin), header + titles + height + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write_header(draw, inspection, image_threshold, sheet.width - 2 * margin, margin)
    for number, (title, picture) in enumerate(columns.items()):
        left = margin + number * (width + margin)
        draw.text((left, header + 2), _shorten(title, font(12), width), MUTED, font(12))
        sheet.paste(picture, (left, header + titles))
    return sheet


def _write_header(draw: ImageDraw.ImageDraw, inspection: Inspection, image_threshold: float | None,
                  width: int, margin: int) -> None:
    """The line above a panel: path on the left; defect, score and verdict on the right."""
    limit = "" if image_threshold is None else f" (threshold {image_threshold:.4g})"
    verdict, colour = _verdict(inspection, image_threshold)
    facts = [inspection.defect or "no ground truth", f"score {inspection.score:.4g}{limit}", verdict]
    line = _shorten("   ".join(facts), font(13, True), width * 0.7)
    used = font(13, True).getlength(line)
    draw.text((margin + width - used, 7), line, colour, font(13, True))
    draw.text((margin, 7), _shorten(inspection.path, font(13), width - used - 20), INK, font(13))


# Files


def panel_names(inspections: Iterable[Inspection]) -> list[str]:
    """A file name for every image, `<defect>_<stem>.png`: safe on every system and unique, also where case is ignored.

    Characters other than letters, digits, dot, hyphen and underscore become an underscore; a name that occurs again
    gets a number. With several categories the category comes first.
    """
    inspections = list(inspections)
    several = len({inspection.category for inspection in inspections}) > 1
    names, taken = [], set()
    for i in inspections:
        words = ([i.category] if several else []) + [i.defect or "unknown", re.split(r"[\\/]", i.path)[-1]]
        words[-1] = words[-1].rpartition(".")[0] or words[-1]
        base = "_".join(re.sub(r"[^\w.-]", "_", word)[:60] for word in words).lstrip(".-")
        name, count = base, 1
        while name.casefold() in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def write_panels(folder: Path | str, inspections: Sequence[Inspection], thresholds: Thresholds,
                 num_workers: int = 2) -> list[Path]:
    """Write a panel for every image into `folder`, drawn by `num_workers` threads; returns the files, in order."""
    scales = map_scales(inspections, thresholds.pixel)

    def draw(inspection: Inspection) -> bytes:
        buffer = io.BytesIO()
        panel(inspection, thresholds.pixel, thresholds.image, scales).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    paths = [Path(folder, name) for name in panel_names(inspections)]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in range(0, len(paths), 64):  # in portions, so that few panels wait in memory
            chunk = slice(start, start + 64)
            for path, content in zip(paths[chunk], pool.map(draw, inspections[chunk]), strict=True):
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
    return paths


def telling(inspections: Sequence[Inspection], rows: int = 12) -> list[tuple[str, Inspection]]:
    """At most `rows` images worth looking at first, each with the reason.

    A quarter are the good images with the highest scores, a quarter the defective ones with the lowest; the rest are
    the middle of every defect kind, by score. Images without ground truth are taken from the highest score down.
    """
    ranked = sorted(inspections, key=lambda i: (-i.score, i.path))
    good = [("highest-scoring good", i) for i in ranked if i.label == 0]
    bad = [("lowest-scoring defective", i) for i in reversed(ranked) if i.label == 1]
    unknown = [("high score, no ground truth", i) for i in ranked if i.label is None]
    groups: dict[str, list[Inspection]] = {}
    for kind, inspection in zip(kinds(ranked), ranked, strict=True):
        if inspection.label == 1:
            groups.setdefault(kind, []).append(inspection)
    typical = [(f"typical {kind}", groups[kind][len(groups[kind]) // 2]) for kind in sorted(groups)]

    quarter = max(1, rows // 4)
    more = [entry for pair in zip_longest(good[quarter:], bad[quarter:]) for entry in pair if entry]
    wanted = good[:quarter] + bad[:quarter] + typical + unknown + more
    chosen: dict[int, tuple[str, Inspection]] = {}
    for reason, inspection in wanted:
        chosen.setdefault(id(inspection), (reason, inspection))  # an image is shown once, under its first reason
    return list(chosen.values())[:rows]


def write_overview(path: Path | str, inspections: Sequence[Inspection], thresholds: Thresholds, rows: int = 12) -> Path:
    """Write one picture of the most telling images: input, reconstruction, overlay and ground truth of each."""
    chosen = telling(inspections, rows)
    scale = map_scales(inspections, thresholds.pixel).get("anomaly map", 0.0)
    counterpart = chosen[0][1].counterpart if chosen else "reconstruction"
    titles = ["input", counterpart, "anomaly map", "ground truth"]
    if all(i.reconstruction is None for _, i in chosen):
        titles.remove(counterpart)

    side, margin, caption, header = 176, 8, 230, 24
    sheet = Image.new("RGB", (caption + len(titles) * (side + margin), header + len(chosen) * (side + margin)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((caption + column * (side + margin), 6), title, MUTED, font(12))
    for row, (reason, inspection) in enumerate(chosen):
        top = header + row * (side + margin)
        lines = [(reason, INK, font(13, True)), (inspection.path, MUTED, font(12)),
                 (f"score {inspection.score:.4g}", INK, font(13)),
                 (*_verdict(inspection, thresholds.image), font(13))]
        for number, (text, colour, face) in enumerate(lines):
            draw.text((margin, top + 20 * number), _shorten(text, face, caption - 2 * margin), colour, face)
        pictures = {"input": inspection.image, counterpart: inspection.reconstruction,
                    "anomaly map": overlay(inspection.image, inspection.anomaly_map, scale),
                    "ground truth": ground_truth(inspection)}
        for column, title in enumerate(titles):
            left, pixels = caption + column * (side + margin), pictures[title]
            empty = Image.new("RGB", (side, side), EMPTY)
            sheet.paste(empty if pixels is None else tile(pixels, side), (left, top))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")
    return Path(path)


def write_curves(path: Path | str, inspections: Sequence[Inspection], thresholds: Thresholds | None = None,
                 found: Curves | None = None) -> Path:
    """Write the score histogram, the ROC curve and the PRO curve as one picture; `found` saves computing them again.

    What labels or masks do not allow is left out, and a line below says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = curves(inspections) if found is None else found
    thresholds = thresholds or Thresholds()
    panels = [("ROC", found.roc, thresholds.image, "false alarm rate", "detection rate"),
              ("PRO", found.pro, thresholds.pixel, "false positive rate of pixels", "overlap per region")]
    panels = [entry for entry in panels if entry[1] is not None]
    figure = Figure(figsize=(max(6.0, 4.6 * (1 + len(panels))), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    _draw_histogram(axes[0], inspections, thresholds.image)
    for axis, (title, curve, threshold, x_label, y_label) in zip(axes[1:], panels, strict=True):
        axis.plot(*curve[:2], color=_hex(GOOD), linewidth=2)
        if threshold is not None:
            axis.plot(*point_at(curve, threshold), "o", color=_hex(INK), label=f"threshold {threshold:.4g}")
            axis.legend(frameon=False, fontsize=9, loc="lower right")
        axis.set(title=title, xlabel=x_label, ylabel=y_label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    if found.notes:
        figure.supxlabel("\n".join(found.notes), fontsize=9)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=120, metadata={"Software": None})
    return Path(path)


def _draw_histogram(axis, inspections: Sequence[Inspection], threshold: float | None) -> None:
    """Scores of good, defective and unknown images on a matplotlib axis, with the threshold as a line."""
    scores = np.array([i.score for i in inspections], dtype=np.float64)
    reach = scores if threshold is None else np.append(scores, threshold)
    wide = spans_decades(scores) and reach.min() > 0
    bins = np.geomspace(reach.min(), reach.max(), 31) if wide else np.histogram_bin_edges(reach, 30)
    for name, label, colour in (("good", 0, GOOD), ("defective", 1, DEFECTIVE), ("unknown", None, UNKNOWN)):
        values = [i.score for i in inspections if i.label == label]
        if values:
            axis.hist(values, bins, color=_hex(colour), alpha=0.65, label=f"{name} ({len(values)})")
    if threshold is not None:
        axis.axvline(threshold, color=_hex(INK), linestyle="--", label=f"threshold {threshold:.4g}")
    axis.set(title="Scores", xlabel="score", ylabel="images", xscale="log" if wide else "linear")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=9)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def show(paths: Iterable[Path | str], seconds_each: float = 0.5) -> bool:
    """Show the pictures one after the other in one window, waiting for nobody; without a screen, say so in one line.

    Closing the window ends the show. Returns whether there was a screen.
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
            figure.canvas.manager.set_window_title(str(path))
            pyplot.pause(seconds_each)
        pyplot.close(figure)
    except Exception as error:  # each toolkit fails in its own way, and a window is never worth a failed run
        print(f"No screen to show the pictures on: {' '.join(str(error).split())}")
        return False
    return True
