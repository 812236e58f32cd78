"""The one loop that calibration, test images and new images go through.

Images are decoded while the network works on those before, go through the detector in batches, and are handed on one
by one, in their order. Nothing is kept: in memory are three batches at most, whatever the number of images.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dbad.data.images import to_pixels
from dbad.errors import printable
from dbad.families.detector import Detector
from dbad.finite import naming
from dbad.inspection.reading import Decoded, Unreadable, read_test
from dbad.records import Origin, Pictures, Prediction, Sample, ScoreRow

T = TypeVar("T")
Read = Callable[[T, "int | None"], "Decoded | Unreadable"]      # a source and the size to bring it to


class Inspected(NamedTuple):
    """One image that has gone through the detector: what was read, its row, and what was predicted (N = 1)."""

    decoded: Decoded
    row: ScoreRow
    prediction: Prediction
    counterpart: str

    def pictures(self, longest: int | None = None) -> Pictures:
        """The arrays to draw, with a longer side of at most `longest` px; the highest values of maps are kept."""
        found = self.prediction
        return Pictures(
            image=to_pixels(_reduced(self.decoded.pixels, longest, F.adaptive_avg_pool2d)),
            reconstruction=None if found.reconstruction is None else to_pixels(
                _reduced(found.reconstruction[0], longest, F.adaptive_avg_pool2d)),
            anomaly_map=_reduced(found.anomaly_map[0], longest, F.adaptive_max_pool2d)[0].numpy(),
            parts={name: _reduced(part[0], longest, F.adaptive_max_pool2d)[0].numpy()
                   for name, part in found.maps.items()},
            mask=self.decoded.mask, counterpart=self.counterpart)


def walk(detector: Detector, samples: Sequence[Sample], num_workers: int, description: str
         ) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Yield the file of every sample and its parts by name, each (1, 1, H, W); needs no calibration.

    Images are read at the network's size; at their own size where the detector works in tiles.
    """
    with (ThreadPoolExecutor(max(1, num_workers)) as pool,
          tqdm(total=len(samples), desc=description, unit="image") as bar):
        for batch in batches(detector, samples, lambda sample, size: read_test(sample, size, detector.intensity), pool):
            parts, _ = detector.parts(torch.stack([found.pixels for found in batch]))
            for number, found in enumerate(batch):
                yield found.path, {name: part[number:number + 1] for name, part in parts.items()}
            bar.update(len(batch))


def inspect(detector: Detector, sources: Sequence[T], origins: Sequence[Origin], read: Read[T], pool: Executor
            ) -> Iterator[Inspected | Unreadable]:
    """Yield every image with what a calibrated detector says of it, in their order.

        sources    what `read` takes, with the size the detector works at (None: images keep theirs)
        origins    what is known of each
        pool       where images are read
    A file that `read` cannot read is yielded in its place. A score or map that is not finite is a `NotFinite`.
    """
    done = 0
    with tqdm(total=len(sources), desc="inspecting", unit="image") as bar:
        for batch in batches(detector, sources, read, pool):
            images = [found for found in batch if isinstance(found, Decoded)]
            if images:
                with naming([image.path for image in images]):
                    prediction = detector.predict(torch.stack([image.pixels for image in images]))
            ones = (prediction.of(index) for index in range(len(images)))
            for origin, found in zip(origins[done:done + len(batch)], batch, strict=True):
                yield found if isinstance(found, Unreadable) else _inspected(detector, found, origin, next(ones))
            done += len(batch)
            bar.update(len(batch))


def inspect_samples(detector: Detector, samples: Sequence[Sample], root: Path, pool: Executor,
                    own_masks: bool = False) -> Iterator[Inspected]:
    """Yield every test image as `inspect` does, with its ground truth; paths are given relative to `root`.

    `own_masks` asks for masks at the size of their files as well. A broken file is a `UserError`.
    """
    def read(sample: Sample, size: int | None) -> Decoded:
        return read_test(sample, size, detector.intensity, own_masks)
    yield from inspect(detector, samples, origins_of(samples, root), read, pool)


def origins_of(samples: Sequence[Sample], root: Path) -> list[Origin]:
    """What is known of test images before they are inspected; paths relative to `root`."""
    return [Origin(printable(sample.path.relative_to(root).as_posix()), sample.category, sample.defect, sample.label)
            for sample in samples]


def batches(detector: Detector, sources: Iterable[T], read: Read[T], pool: Executor
            ) -> Iterator[list[Decoded | Unreadable]]:
    """Whole batches of what can be read, and in their places what could not be read on the way.

    While the caller works on one, the next is being decoded.
    """
    size, step = None if detector.patching else detector.size, batch_of(detector)
    todo, batch, num_images = iter(sources), [], 0
    waiting = deque(pool.submit(read, source, size) for source in islice(todo, step))
    while waiting:
        batch.append(waiting.popleft().result())
        num_images += isinstance(batch[-1], Decoded)
        waiting.extend(pool.submit(read, source, size) for source in islice(todo, 1))
        if num_images == step or not waiting:
            yield batch
            batch, num_images = [], 0


def batch_of(detector: Detector) -> int:
    """How many images go through the detector at once; one where it is cut into tiles."""
    return 1 if detector.patching else detector.machine.batch_size


class Jobs:
    """What is done in the threads of a pool with images that have gone through: `most` wait for it, and no more.

    `then` is called with what each job returns, in the order they were added and in the thread that adds them.
    """

    def __init__(self, pool: Executor, most: int, then: Callable[[Any], object] = lambda result: None):
        self.pool, self.most, self.then = pool, most, then
        self.waiting: deque[Future] = deque()

    def add(self, function: Callable, *arguments: object) -> None:
        """Have the function called; raises what one before has failed with."""
        self.finish(self.most - 1)
        self.waiting.append(self.pool.submit(function, *arguments))

    def finish(self, most: int = 0) -> None:
        """Wait until at most so many are waiting; raises what one has failed with."""
        while len(self.waiting) > most:
            self.then(self.waiting.popleft().result())


def started(things: Iterable[T]) -> Iterator[T]:
    """An iterator whose first thing is there already: what cannot be begun has failed by now. There has to be one."""
    things = iter(things)
    first = [next(things)]

    def all_of_them() -> Iterator[T]:
        yield first.pop()       # and is not kept
        yield from things
    return all_of_them()


class Timed(Generic[T]):
    """Iterates over what it is given and adds up, in `seconds`, how long that takes; not what is done in between."""

    def __init__(self, things: Iterable[T]):
        self.things, self.seconds = things, 0.0

    def __iter__(self) -> Iterator[T]:
        things, done = iter(self.things), object()
        while True:
            begun = time.monotonic()
            thing = next(things, done)
            self.seconds += time.monotonic() - begun
            if thing is done:
                return
            yield thing


def _inspected(detector: Detector, decoded: Decoded, origin: Origin, found: Prediction) -> Inspected:
    score = float(found.score)
    row = ScoreRow(*origin, score, None if found.p_value is None else float(found.p_value),
                   detector.calibration.normalised(score), int(found.decision))
    return Inspected(decoded, row, found, detector.counterpart)


def _reduced(values: Tensor, longest: int | None, pool: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """(C, H, W) with a longer side of at most `longest`."""
    shape = tuple(values.shape[-2:])
    factor = min(1.0, (longest or max(shape)) / max(shape))
    return values if factor == 1 else pool(values, tuple(max(1, round(length * factor)) for length in shape))
