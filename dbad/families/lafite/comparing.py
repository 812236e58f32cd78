"""The comparison of pseudo-anomalies with a memory bank, which takes most of the time before a search."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from dbad.families.lafite.detector import FeatureDetector
from dbad.families.search import LEAST_IMAGES


def evidence_of(detector: FeatureDetector, images: Tensor, bar: tqdm, most_s: float = math.inf
                ) -> tuple[Tensor, float]:
    """The evidence of images (N, 3, S, S) for the detector's discriminator, (N, P, G, G) on the CPU, and its speed.

    The speed is that of the fastest batch, in seconds per image. After `most_s` seconds the rest of the images is left
    out, if there are `LEAST_IMAGES`.
    """
    found, fastest_s, first = [], math.inf, time.monotonic()
    for batch in images.split(detector.machine.batch_size):
        begun = time.monotonic()
        found.append(detector.evidence(detector.look_up(batch, judged=True)).cpu())
        fastest_s = min(fastest_s, (time.monotonic() - begun) / len(batch))
        bar.update(len(batch))
        if sum(map(len, found)) >= LEAST_IMAGES and time.monotonic() - first > most_s:
            break
    return torch.cat(found), fastest_s


def affordable(num_images: int, per_image: int, image_s: float, left_s: float) -> tuple[int, int]:
    """The good images, of `num_images`, and the pseudo-anomalies on each that can be compared in `left_s` seconds.

    An image takes `image_s` seconds; the good ones are compared already. There are at least `LEAST_IMAGES`, with one
    pseudo-anomaly each, whatever the time.
    """
    fit = left_s / max(image_s, 1e-9)
    if num_images * per_image <= fit:
        return num_images, per_image
    each = int(fit / num_images)
    return (num_images, each) if each > 0 else (min(num_images, max(LEAST_IMAGES, int(fit))), 1)
