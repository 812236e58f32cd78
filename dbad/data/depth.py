"""The bit depth of a data set, and the `Intensity` of a run: from its training, or found in its training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from dbad.data.full_depth import Deep, is_deep, read_picture
from dbad.data.intensity import DEPTHS, Intensity, check_floats, largest_integer
from dbad.errors import UserError
from dbad.records import Sample


class Reading(Protocol):
    """The options of reading images."""

    @property
    def intensity(self) -> str | None: ...

    @property
    def num_workers(self) -> int: ...


def run_intensity(options: Reading, trained: Mapping[str, Any], samples: Sequence[Sample], quiet: bool = False
                  ) -> Intensity:
    """The conversion of pictures to 8 bits in a run: that of its training or, if unknown, found in training images.

        options    intensity, None for that of the training, and num_workers
        trained    "intensity" and "intensity_bits" of the run that `options` continue, see `trained_options`
        samples    good training images of all categories of the run

    With auto, the depth is the smallest of `DEPTHS` that holds the largest value of all these images together. A line
    tells the depth unless `quiet`. Images of 8 bits are not decoded for it.
    """
    known = Intensity.of({**trained, "intensity": options.intensity or trained.get("intensity")})
    if known.is_known:
        return known
    deep = [path for path, is_one in _each(is_deep, [sample.path for sample in samples], options.num_workers) if is_one]
    largest, where = max(((value, path) for path, value in _each(_largest_value, deep, options.num_workers)
                          if value is not None), default=(0, None))
    bits = next((bits for bits in DEPTHS if largest < 2 ** bits), None)
    if bits is None:
        raise UserError(f"{where}: largest value {largest}, above the {2 ** DEPTHS[-1] - 1} of {DEPTHS[-1]} bits; "
                        "expected --intensity window:LOW,HIGH")
    if where is not None and not quiet:
        print(f"images of {bits} bits: the largest value of {len(samples)} training images is {largest} ({where}); "
              f"0 to {2 ** bits - 1} become 0 to 255")
    return Intensity("auto", bits)


def _each(function: Any, paths: Sequence[Path], num_workers: int) -> list[tuple[Path, Any]]:
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        return list(zip(paths, pool.map(function, paths), strict=True))


def _largest_value(path: Path) -> int | None:
    """The largest value of a picture of integers; None for floats, which must lie between 0 and 1."""
    picture = read_picture(path)
    assert isinstance(picture, Deep)
    if picture.values.dtype.kind != "f":
        return largest_integer(picture, path)
    check_floats(picture, path)
    return None
