"""The curves of a run as one picture: scores, ROC and PRO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dbad.files.atomic import atomic_write
from dbad.metrics import AUPRO_LIMITS
from dbad.metrics.verdicts import Curves, Thresholds, point_at, spans_decades
from dbad.records import ScoreRow
from dbad.report.drawing import DEFECTIVE, GOOD, INK, UNKNOWN

PRO_LIMIT = max(AUPRO_LIMITS)       # up to which the area is measured first of all


def write_curves(path: Path | str, rows: Sequence[ScoreRow], thresholds: Thresholds, found: Curves) -> Path:
    """Write the score histogram, the ROC curve and the PRO curve as one picture.

    A curve that lacks its labels or masks is left out, and a line below says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    both = [("ROC", found.roc, thresholds.image, ("false alarm rate", "detection rate")),
            ("PRO", found.pro, thresholds.pixel, ("false positive rate of pixels", "overlap per region"))]
    panels = [(title, curve, threshold, labels) for title, curve, threshold, labels in both if curve is not None]
    figure = Figure(figsize=(max(6.0, 4.6 * (1 + len(panels))), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    _draw_histogram(axes[0], rows, thresholds.image)
    for axis, (title, curve, threshold, (x_label, y_label)) in zip(axes[1:], panels, strict=True):
        axis.plot(*curve[:2], color=_hex(GOOD), linewidth=2)
        point = point_at(curve, threshold)
        if point is not None:
            axis.plot(*point, "o", color=_hex(INK), label=f"threshold {threshold:.4g}")
        if title == "PRO":
            axis.axvspan(0, PRO_LIMIT, color=_hex(GOOD), alpha=0.1, linewidth=0)
            axis.axvline(PRO_LIMIT, color=_hex(GOOD), linewidth=1, linestyle="--",
                         label=f"limit of AUPRO, {PRO_LIMIT:g}")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9, loc="lower right")
        axis.set(title=title, xlabel=x_label, ylabel=y_label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    if found.notes:
        figure.supxlabel("\n".join(found.notes), fontsize=9)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=120, metadata={"Software": None})
    return Path(path)


def _draw_histogram(axis, rows: Sequence[ScoreRow], threshold: float | None) -> None:
    """Scores of good, defective and unknown images on a matplotlib axis, with the threshold as a line."""
    scores = np.array([row.score for row in rows], dtype=np.float64)
    reach = scores if threshold is None else np.append(scores, threshold)
    wide = spans_decades(scores) and reach.min() > 0
    bins = np.geomspace(reach.min(), reach.max(), 31) if wide else np.histogram_bin_edges(reach, 30)
    for name, label, colour in (("good", 0, GOOD), ("defective", 1, DEFECTIVE), ("unknown", None, UNKNOWN)):
        values = [row.score for row in rows if row.label == label]
        if values:
            axis.hist(values, bins, color=_hex(colour), alpha=0.65, label=f"{name} ({len(values)})")
    if threshold is not None:
        axis.axvline(threshold, color=_hex(INK), linestyle="--", label=f"threshold {threshold:.4g}")
    axis.set(title="Scores", xlabel="score", ylabel="images", xscale="log" if wide else "linear")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=9)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
