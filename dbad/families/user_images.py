"""Detectors on images that a Python user has at hand: one image, several, or more than fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dbad.data.images import to_pixels
from dbad.data.inputs import ImageLike, to_input
from dbad.errors import UserError
from dbad.finite import NotFinite
from dbad.metrics.protocol import resized_map
from dbad.records import ImagePrediction, Prediction

if TYPE_CHECKING:
    from dbad.families.detector import Detector

FEW = 8         # longer lists get a progress bar


def one_by_one(detector: Detector, images: Iterable[ImageLike], progress: bool = True) -> Iterator[ImagePrediction]:
    """Yield the result for every image, in order; one batch of images and results is in memory at a time.

    With `progress`, a list of more than `FEW` images has a progress bar.
    """
    total = len(images) if isinstance(images, Sized) else 0
    size, step = None if detector.patching else detector.size, 1 if detector.patching else detector.machine.batch_size
    todo, done = iter(images), 0
    with tqdm(total=total, desc="inspecting", unit="image", disable=not progress or total <= FEW) as bar:
        while batch := [to_input(image, size, detector.intensity) for image in islice(todo, step)]:
            try:
                found = detector.predict(torch.stack([image.pixels for image in batch]))
            except NotFinite as error:      # its number counts within the batch
                raise NotFinite(error.what, done + error.number, batch[error.number].name) from None
            for number, image in enumerate(batch):
                yield image_prediction(detector, found.of(number), image.own_size)
            done += len(batch)
            bar.update(len(batch))


def as_batch(detector: Detector, images: Tensor) -> Prediction:
    """The result for a tensor (N, 3, H, W) in [-1, 1], as tensors at the size that the detector works at."""
    if not len(images):
        raise UserError(f"tensor of shape {tuple(images.shape)}: no images; expected at least one")
    size = None if detector.patching else detector.size
    return detector.predict(torch.stack([to_input(image, size, detector.intensity).pixels for image in images]))


def image_prediction(detector: Detector, found: Prediction, size: tuple[int, int]) -> ImagePrediction:
    """The result for an image of `size` = (H, W), from a prediction of N = 1; maps are resized as exported ones are."""
    calibration = detector.calibrated()
    assert found.decision is not None, "a detector that predicts is calibrated"
    reconstruction = None if found.reconstruction is None else np.array(
        Image.fromarray(to_pixels(found.reconstruction[0])).resize(size[::-1], Image.Resampling.BILINEAR))
    return ImagePrediction(
        score=float(found.score), threshold=calibration.image_threshold, decision=bool(found.decision),
        p_value=None if found.p_value is None else float(found.p_value),
        anomaly_map=resized_map(found.anomaly_map[0, 0].numpy(), size), pixel_threshold=calibration.pixel_threshold,
        maps={name: resized_map(part[0, 0].numpy(), size) for name, part in found.maps.items()},
        reconstruction=reconstruction)
