"""Sample pictures of a training: held-out images, and below them the output of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, zip_longest
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dbad.data.images import to_float, to_pixels
from dbad.files.atomic import atomic_write


def in_turn(categories: Iterable[Sequence[Tensor]], count: int = 8) -> Tensor:
    """At most `count` images, taken from all categories in turn: uint8 (3, S, S) -> (N, 3, S, S) in [-1, 1]."""
    images = (image for rank in zip_longest(*categories) for image in rank if image is not None)
    return to_float(torch.stack(list(islice(images, count))))


def write_sheet(path: Path, rows: Sequence[Tensor], log_dir: Path, tag: str, step: int) -> None:
    """Write batches (N, 3, S, S) in [-1, 1] as the rows of one picture: to a file, and as `tag` for TensorBoard."""
    picture = to_pixels(torch.cat([torch.cat(list(row.cpu()), dim=2) for row in rows], dim=1))
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary)
    with SummaryWriter(str(log_dir)) as events:
        events.add_image(tag, picture, step, dataformats="HWC")
