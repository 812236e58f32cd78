"""One picture of the images worth looking at first, chosen from a stream: only small pictures are kept."""

from __future__ import annotations

import io
from bisect import insort
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageDraw

from dbad.files.atomic import atomic_write
from dbad.metrics.verdicts import Thresholds, kinds
from dbad.records import Origin, Pictures, ScoreRow
from dbad.report.colours import heat
from dbad.report.drawing import EMPTY, INK, MUTED, PAPER, draw_bar, font, shorten, tile
from dbad.report.panels import verdict

ROWS = 12           # of the overview
SIDE = 176          # px, of its pictures
AROUND = 16         # on either side of the middle of a defect kind, so many images may become its typical one
MARGIN, CAPTION, TOP, HEADING = 8, 230, 66, 30      # px: between pictures, left of them, above them, above a group

HEADINGS = {        # of the groups of images, in their order, by the beginning of the reason
    "highest-scoring good": "Good images with the highest scores",
    "lowest-scoring defective": "Defective images with the lowest scores",
    "typical": "A typical image of each kind of defect, by score",
    "high score": "Images with the highest scores, without ground truth",
}


class Overview:
    """The choice of the images worth looking at in a stream, see `telling`; it keeps the pictures of few candidates.

    `offer` takes an image's row, and returns True if its pictures are wanted. Candidates are the `ROWS` images at the
    ends of the scores that are shown, and for every defect kind the 32 in the middle of those so far. If a kind has
    more images, its typical one is the candidate nearest to the middle at the end.
    """

    def __init__(self, origins: Sequence[Origin], thresholds: Thresholds):
        """`origins` are those of all images of the stream, in order."""
        self.thresholds, self.kinds = thresholds, kinds(origins)
        self.rows: dict[int, ScoreRow] = {}
        self.candidates: dict[int, dict[str, bytes]] = {}
        self._ends = {0: _Ranking(lambda count: slice(0, ROWS)), None: _Ranking(lambda count: slice(0, ROWS)),
                      1: _Ranking(lambda count: slice(max(0, count - ROWS), count))}
        defects = {kind for kind, origin in zip(self.kinds, origins, strict=True) if origin.label == 1}
        self._middles = {kind: _Ranking(lambda count: slice(max(0, count // 2 - AROUND), count // 2 + AROUND))
                         for kind in sorted(defects)[:ROWS]}

    def offer(self, number: int, row: ScoreRow) -> bool:
        """Add the row of the image of this number; True if its pictures are wanted."""
        self.rows[number] = row
        rankings = [self._ends[row.label]]
        if row.label == 1 and self.kinds[number] in self._middles:
            rankings.append(self._middles[self.kinds[number]])
        for ranking in rankings:
            ranking.add((-row.score, row.path, number))
        wanted = set().union(*(ranking.candidates() for ranking in (*self._ends.values(), *self._middles.values())))
        self.candidates = {known: files for known, files in self.candidates.items() if known in wanted}
        if number in wanted:
            self.candidates[number] = {}
        return number in wanted

    def put(self, number: int, files: dict[str, bytes]) -> None:
        """Add the `small_pictures` of an image that was wanted; ignored if it is no candidate any more."""
        if number in self.candidates:
            self.candidates[number] = files

    def write(self, path: Path, counterpart: str = "reconstruction") -> None:
        """Write the picture: input, reconstruction, map and ground truth of each image, by rows in groups."""
        chosen = self._once_each(telling(self.rows, self.kinds, self.candidates))
        titles = ["input", "reconstruction", "anomaly map", "ground truth"]
        if not any("reconstruction" in self.candidates[number] for _, number in chosen):
            titles.remove("reconstruction")
        groups: dict[str, list[int]] = {}
        for reason, number in sorted(chosen, key=lambda entry: _place(entry[0])):
            groups.setdefault(list(HEADINGS.values())[_place(reason)], []).append(number)

        sheet = Image.new("RGB", (CAPTION + len(titles) * (SIDE + MARGIN),
                                  TOP + len(groups) * HEADING + len(chosen) * (SIDE + MARGIN)), PAPER)
        draw, top = ImageDraw.Draw(sheet), TOP
        self._write_top(sheet, draw, [counterpart if title == "reconstruction" else title for title in titles])
        for heading, numbers in groups.items():
            draw.text((MARGIN, top + 7), heading, INK, font(14, True))
            top += HEADING
            for number in numbers:
                self._write_caption(draw, self.kinds[number], self.rows[number], (MARGIN, top), CAPTION - 2 * MARGIN)
                for column, title in enumerate(titles):
                    file = self.candidates[number].get(title)
                    picture = Image.new("RGB", (SIDE, SIDE), EMPTY) if file is None else Image.open(io.BytesIO(file))
                    sheet.paste(picture, (CAPTION + column * (SIDE + MARGIN), top))
                top += SIDE + MARGIN
        with atomic_write(path) as temporary:
            sheet.save(temporary, "PNG")

    def _once_each(self, chosen: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """The chosen images without those that look like one before them: copies of a file under another name."""
        seen: dict[bytes | int, tuple[str, int]] = {}
        for reason, number in chosen:
            seen.setdefault(self.candidates[number].get("input", number), (reason, number))
        return list(seen.values())

    def _write_top(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, titles: Sequence[str]) -> None:
        """Write what the picture shows, the bar of the colours, and the titles of the columns."""
        categories = ", ".join(sorted({row.category for row in self.rows.values()}))
        limit = "" if self.thresholds.image is None else f"image threshold {self.thresholds.image:.4g}"
        width = CAPTION + SIDE - MARGIN
        draw.text((MARGIN, 6), shorten(f"{categories}: images to look at first", font(14, True), width), INK,
                  font(14, True))
        draw.text((MARGIN, 28), limit, MUTED, font(12))
        for column, title in enumerate(titles):
            left = CAPTION + column * (SIDE + MARGIN)
            draw.text((left, TOP - 18), shorten(title, font(12), SIDE), MUTED, font(12))
            if title == "anomaly map" and self.thresholds.pixel is not None:
                draw_bar(sheet, (left, 12), SIDE, 2 * self.thresholds.pixel, True)

    def _write_caption(self, draw: ImageDraw.ImageDraw, kind: str, row: ScoreRow, place: tuple[int, int],
                       width: int) -> None:
        words, colour = verdict(row, self.thresholds.image)
        lines = [(kind, INK, font(13, True)), (row.path, MUTED, font(12)), (f"score {row.score:.4g}", INK, font(13)),
                 (words, colour, font(13))]
        for number, (text, ink, face) in enumerate(lines):
            draw.text((place[0], place[1] + 20 * number), shorten(text, face, width), ink, face)


class _Ranking:
    """Sorted keys (-score, path, number); `window` gives the slice of candidates for a number of keys."""

    def __init__(self, window: Callable[[int], slice]):
        self.keys: list[tuple[float, str, int]] = []
        self.window = window

    def add(self, key: tuple[float, str, int]) -> None:
        insort(self.keys, key)

    def candidates(self) -> set[int]:
        return {number for _, _, number in self.keys[self.window(len(self.keys))]}


def _place(reason: str) -> int:
    """The place of a reason's group among `HEADINGS`."""
    return next(place for place, start in enumerate(HEADINGS) if reason.startswith(start))


def small_pictures(pictures: Pictures, scale: float) -> dict[str, bytes]:
    """The pictures of an image for the overview by their titles, each a PNG file; missing ones are left out.

    `scale` is that of the anomaly map, see `map_scales`.
    """
    arrays = {"input": pictures.image, "reconstruction": pictures.reconstruction,
              "anomaly map": heat(pictures.anomaly_map, scale), "ground truth": pictures.mask}
    files = {}
    for title, pixels in arrays.items():
        if pixels is not None:
            buffer = io.BytesIO()
            tile(pixels, SIDE).save(buffer, "PNG", compress_level=1)
            files[title] = buffer.getvalue()
    return files


def telling(rows: Mapping[int, ScoreRow], names: Sequence[str], candidates: Collection[int], most: int = ROWS
            ) -> list[tuple[str, int]]:
    """At most `most` images worth looking at first, each as (reason, number).

    A quarter are the good images with the highest scores, a quarter the defective ones with the lowest; the rest are
    the middle of every defect kind, by score. Images without ground truth are taken from the highest score down.

        rows          of all images, by their numbers
        names         the kind of every image, by its number
        candidates    the numbers to choose from
    """
    ranked = sorted(rows, key=lambda number: (-rows[number].score, rows[number].path))
    good = [("highest-scoring good", n) for n in ranked if rows[n].label == 0]
    bad = [("lowest-scoring defective", n) for n in reversed(ranked) if rows[n].label == 1]
    unknown = [("high score, no ground truth", n) for n in ranked if rows[n].label is None]
    groups: dict[str, list[int]] = {}
    for number in ranked:
        if rows[number].label == 1:
            groups.setdefault(names[number], []).append(number)
    typical = [(f"typical {kind}", number) for kind in sorted(groups) for number in _middle(groups[kind], candidates)]

    quarter = max(1, most // 4)
    more = [entry for pair in zip_longest(good[quarter:], bad[quarter:]) for entry in pair if entry]
    wanted = good[:quarter] + bad[:quarter] + typical + unknown + more
    chosen: dict[int, str] = {}
    for reason, number in wanted:
        if number in candidates:
            chosen.setdefault(number, reason)       # an image is shown once, under its first reason
    return [(reason, number) for number, reason in chosen.items()][:most]


def _middle(ranked: Sequence[int], candidates: Collection[int]) -> list[int]:
    """The candidate nearest to the middle of a ranking, if there is one."""
    places = sorted(range(len(ranked)), key=lambda place: (abs(place - len(ranked) // 2), place))
    return [ranked[place] for place in places if ranked[place] in candidates][:1]
