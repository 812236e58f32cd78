"""Whether a grid of tiles shows in a map: tile borders against the rest, and the energy at the grid's frequencies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dbad.data.tiling import tile_starts
from dbad.errors import UserError
from dbad.files.atomic import atomic_write

HARMONICS = (1, 2, 3)       # multiples of the grid's frequency
MIN_PERIODS = 4             # that a map has to show, for there to be frequencies between those of the grid


@dataclass(frozen=True)
class Seams:
    """What a map shows of the grid.

        period     from one tile to the next, in px: rows, columns
        border     mean of the map on rows and columns at tile borders, divided by the mean elsewhere
        expected   mean of that ratio for grids of the same period in random places
        p_value    share of those grids, in (0, 1], whose ratio is as far from `expected`, either way
        energy     energy of the row and column means at multiples of the grid's frequency, divided by the energy
                   between them; about 1 for noise
        usual      95 % quantile of that for other periods, from half to twice as long: what else is regular, such as a
                   weave, has energy too
    """

    period: tuple[float, float]
    border: float
    expected: float
    p_value: float
    energy: float
    usual: float


def measure_seams(values: np.ndarray, tile: int, overlap: float, num_shifts: int = 999, seed: int = 0) -> Seams:
    """Look for the grid of `dbad.data.tiling.tile_places` in a map (H, W) >= 0.

    The outermost tile on each side is left out: beyond the image's own border the network sees nothing, and what that
    makes of the map is no grid.
    """
    periods, shifts = [], []
    rng = np.random.default_rng(seed)
    for length in values.shape:
        count = len(tile_starts(length, tile, overlap))
        if count < 2 or (length - 2 * tile) * (count - 1) < MIN_PERIODS * (length - tile):
            raise UserError(f"a map of {values.shape[1]}x{values.shape[0]} px shows too little of a grid of {tile} px "
                            f"tiles; expected {MIN_PERIODS} periods beside the outermost tiles")
        periods.append((length - tile) / (count - 1))
        shifts.append(np.append(0, rng.uniform(0, periods[-1], num_shifts)))
    inner = values[tile:values.shape[0] - tile, tile:values.shape[1] - tile].astype(np.float64)
    at = [near_borders(np.arange(tile, tile + n), tile, period, shift)
          for n, period, shift in zip(inner.shape, periods, shifts, strict=True)]
    ratios = border_ratios(inner, *at)
    away = np.abs(ratios - ratios[1:].mean())
    return Seams(tuple(periods), float(ratios[0]), float(ratios[1:].mean()),
                 float((1 + (away[1:] >= away[0]).sum()) / (1 + num_shifts)), *energies(inner, periods))


def near_borders(places: np.ndarray, tile: int, period: float, shifts: np.ndarray) -> np.ndarray:
    """Which of the pixels at `places` (n,) lie at the border of a tile, in a grid moved by `shifts` px (k,).

    Tiles start at every multiple of the period and end `tile` px further; a border is a 32nd of a tile wide, either
    way. Returns (k, n) float64 in {0, 1}.
    """
    phase = (places + 0.5)[None] - shifts[:, None]
    phases = np.stack([phase, phase - tile]) % period
    return (np.minimum(phases, period - phases).min(axis=0) < max(1, tile // 32)).astype(np.float64)


def border_ratios(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Mean of a map (H, W) on chosen rows and columns over the mean elsewhere: (k, H), (k, W) in {0, 1} -> (k,)."""
    on_rows = rows @ values
    total = on_rows.sum(axis=1) + columns @ values.sum(axis=0) - (on_rows * columns).sum(axis=1)
    count = rows.sum(axis=1) * values.shape[1] + columns.sum(axis=1) * (values.shape[0] - rows.sum(axis=1))
    return total / count / ((values.sum() - total) / (values.size - count))


def energies(values: np.ndarray, periods: Sequence[float]) -> tuple[float, float]:
    """`Seams.energy` and `Seams.usual` of a map (H, W); the other periods can be told from the grid's in such a map."""
    shown = min(n / period for n, period in zip(values.shape, periods, strict=True))
    others = [f for f in np.geomspace(0.55, 1.8, 60) if abs(1 - 1 / f) > 2 / shown and f <= shown / MIN_PERIODS]
    found = [np.mean([grid_energy(values.mean(axis=1 - axis), factor * period) for axis, period in enumerate(periods)])
             for factor in (1, *others)]
    return float(found[0]), float(np.quantile(found[1:], 0.95))


def grid_energy(profile: np.ndarray, period: float) -> float:
    """Energy of a profile (n,) at multiples of 1 / `period`, over that at the frequencies around each of them.

    With a Hann window over a whole number of periods k, a line at one frequency reaches at most 2 / (k period) from it.
    """
    k = int(len(profile) / period)
    profile = profile[:round(k * period)]
    profile = (profile - profile.mean()) * np.hanning(len(profile) + 2)[1:-1]

    def energy(frequency: float) -> float:
        return float(np.abs(profile @ np.exp(-2j * np.pi * frequency * np.arange(len(profile)))) ** 2)

    around = [j / k for j in range(-(k // 2), k // 2 + 1) if abs(j) >= 2]
    return float(np.mean([energy(h / period) / np.mean([energy((h + step) / period) for step in around])
                          for h in HARMONICS]))


def draw_maps(path: Path, maps: Sequence[np.ndarray], titles: Sequence[str], tile: int) -> None:
    """Mean maps (H, W) side by side in the same colours, with a colour bar; ticks are a tile apart."""
    figure = Figure(figsize=(1 + 5 * len(maps), 5.2), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    high = max(float(np.quantile(values, 0.999)) for values in maps)
    for axis, values, title in zip(axes, maps, titles, strict=True):
        shown = axis.imshow(values, cmap="turbo", vmin=0, vmax=high, interpolation="none")
        axis.set_title(title, fontsize=9)
        axis.set(xticks=range(0, values.shape[1] + 1, tile), yticks=range(0, values.shape[0] + 1, tile))
        axis.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axes, label="mean anomaly map of good images, colours end at its 99.9 % quantile")
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})
