"""The loop that calibration, test images and new images share.

Images are decoded while the network works on those before. They go through the detector in batches and are yielded one
by one, in their order. Nothing is kept: at most three batches are in memory, whatever the number of images.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
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
Found = TypeVar("Found", bound="Decoded | Unreadable")
Read = Callable[[T, "int | None"], Found]      # a source, and the size to resize it to


class Inspected(NamedTuple):
    """One image that has gone through the detector: the decoded file, its row and its prediction (N = 1)."""

    decoded: Decoded
    row: ScoreRow
    prediction: Prediction
    counterpart: str

    def pictures(self, longest: int | None = None) -> Pictures:
        """The arrays to draw, their longer side at most `longest` px; reduced maps keep their highest values."""
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


def inspect(detector: Detector, sources: Sequence[T], origins: Sequence[Origin], read: Read[T, Decoded | Unreadable],
            pool: Executor) -> Iterator[Inspected | Unreadable]:
    """Yield every image with the prediction of a calibrated detector, in order.

        sources    arguments of `read`, which also gets the detector's size (None: images keep theirs)
        origins    description of each source
        pool       threads that read the images
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
    """Yield every test image as `inspect` does, with its ground truth; paths are relative to `root`.

    `own_masks` asks for masks at the size of their files as well. A broken file is a `UserError`.
    """
    def read(sample: Sample, size: int | None) -> Decoded:
        return read_test(sample, size, detector.intensity, own_masks, pictured=True)
    for found in inspect(detector, samples, origins_of(samples, root), read, pool):
        assert isinstance(found, Inspected), "a broken test image is an error"
        yield found


def origins_of(samples: Sequence[Sample], root: Path) -> list[Origin]:
    """The descriptions of test images before inspection; paths are relative to `root`."""
    return [Origin(printable(sample.path.relative_to(root).as_posix()), sample.category, sample.defect, sample.label)
            for sample in samples]


def batches(detector: Detector, sources: Iterable[T], read: Read[T, Found], pool: Executor
            ) -> Iterator[list[Found]]:
    """Yield full batches of readable images; unreadable files are added to the batch at their places.

    While the caller works on one batch, the next is decoded.
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
    """The number of images that go through the detector at once; 1 if images are cut into tiles."""
    return 1 if detector.patching else detector.machine.batch_size


class Jobs:
    """Jobs in the threads of a pool, at most `most` at a time, on images that have gone through the detector.

    `then` is called with the result of each job, in the order of adding and in the thread that adds them.
    """

    def __init__(self, pool: Executor, most: int, then: Callable[[Any], object] = lambda result: None):
        self.pool, self.most, self.then = pool, most, then
        self.waiting: deque[Future] = deque()

    def add(self, function: Callable, *arguments: object) -> None:
        """Have the function called; raises the error of an earlier job that failed."""
        self.finish(self.most - 1)
        self.waiting.append(self.pool.submit(function, *arguments))

    def finish(self, most: int = 0) -> None:
        """Wait until at most `most` jobs are left; raises the error of a job that failed."""
        while len(self.waiting) > most:
            self.then(self.waiting.popleft().result())

    def settle(self) -> None:
        """Wait until no job is left, whatever its outcome."""
        wait(self.waiting)


def started(things: Iterable[T]) -> Iterator[T]:
    """An iterator whose first item is computed now, so that a failure at the start comes now; needs at least one."""
    things = iter(things)
    first = [next(things)]

    def all_of_them() -> Iterator[T]:
        yield first.pop()       # pop, so that it is not kept
        yield from things
    return all_of_them()


class Timed(Generic[T]):
    """An iterable that sums up in `seconds` the time its items take, without the work of the caller in between."""

    def __init__(self, things: Iterable[T]):
        self.things, self.seconds = things, 0.0

    def __iter__(self) -> Iterator[T]:
        things = iter(self.things)
        while True:
            begun = time.monotonic()
            try:
                thing = next(things)
            except StopIteration:
                return
            finally:
                self.seconds += time.monotonic() - begun
            yield thing


def _inspected(detector: Detector, decoded: Decoded, origin: Origin, found: Prediction) -> Inspected:
    score = float(found.score)
    assert found.decision is not None, "a detector that predicts is calibrated"
    row = ScoreRow(*origin, score, None if found.p_value is None else float(found.p_value),
                   detector.calibrated().normalised(score), int(found.decision))
    return Inspected(decoded, row, found, detector.counterpart)


def _reduced(values: Tensor, longest: int | None, pool: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """The values (C, H, W) reduced to a longer side of at most `longest`."""
    height, width = values.shape[-2:]
    factor = min(1.0, (longest or max(height, width)) / max(height, width))
    return values if factor == 1 else pool(values, (max(1, round(height * factor)), max(1, round(width * factor))))
