"""Sample pictures of a training: held-out images, and below them the output of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dbad.data.images import to_float, to_pixels
from dbad.files.atomic import atomic_write

SIDE, GAP, LABEL = 128, 4, 20       # px: of a picture at least, between pictures, for the name of a row


def in_turn(categories: Iterable[Sequence[Tensor]], count: int = 8) -> Tensor:
    """At most `count` images, taken from all categories in turn: uint8 (3, S, S) -> (N, 3, S, S) in [-1, 1]."""
    images = (image for rank in zip_longest(*categories) for image in rank if image is not None)
    return to_float(torch.stack(list(islice(images, count))))


def labelled_rows(rows: Mapping[str, Tensor]) -> np.ndarray:
    """Batches (N, 3, S, S) in [-1, 1], each a row of pictures under its name, as one picture (H, W, 3) uint8.

    Pictures smaller than `SIDE` px are enlarged by a whole number, so that their pixels stay visible.
    """
    num_images, size = max(map(len, rows.values())), next(iter(rows.values())).shape[-1]
    factor = max(1, -(-SIDE // size))
    step, face = factor * size + GAP, ImageFont.load_default(LABEL - 4)
    sheet = Image.new("RGB", (num_images * step + GAP, len(rows) * (step + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (step + LABEL)
        draw.text((GAP, top + 1), name, (27, 31, 36), face)
        for column, pixels in enumerate(to_pixels(images.cpu())):
            enlarged = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(enlarged), (GAP + column * step, top + LABEL))
    return np.asarray(sheet)


def write_sheet(path: Path, rows: Mapping[str, Tensor], log_dir: Path, tag: str, step: int) -> None:
    """Write `labelled_rows` as a file, and as `tag` for TensorBoard."""
    picture = labelled_rows(rows)
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary)
    with SummaryWriter(str(log_dir)) as events:
        events.add_image(tag, picture, step, dataformats="HWC")
