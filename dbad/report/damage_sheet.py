"""A sheet of pseudo-anomalies to look at: each kind of damage, drawn on good images of a category.

    python -m dbad.calibration --preview --dataset_path data/mvtec --item screw --out sheet.png
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from dbad.damage.foreground import as_picture
from dbad.damage.pseudo import KINDS, draw_on, generator
from dbad.data.categories import open_category
from dbad.data.depth import run_intensity
from dbad.data.images import read_images, to_float, to_pixels
from dbad.errors import UserError
from dbad.fields import check, check_value
from dbad.files.atomic import atomic_write
from dbad.options.shared import RunOptions
from dbad.report.drawing import MUTED, PAPER, font, outlined, tile
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures


def preview(images: Sequence[Tensor], names: Sequence[str], seed: int = 0, side: int = 192) -> Image.Image:
    """A sheet with a row for each good image and a column for each kind: the damaged image, and below it its outline.

    `side` is the longer side of a tile in pixels. Below each pair are the share of area changed and the contrast.
    """
    pictures = [as_picture(image) for image in images]
    margin, title, caption = 6, 22, 16
    tiles = [tile(to_pixels(image), side) for image in images]
    tops = np.cumsum([title] + [2 * t.height + caption + 2 * margin for t in tiles])
    sheet = Image.new("RGB", (margin + (len(KINDS) + 1) * (side + margin), int(tops[-1])), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(("good image", *KINDS)):
        draw.text((margin + column * (side + margin), 4), text, MUTED, font(12, True))
    for row, (name, good) in enumerate(zip(names, tiles, strict=True)):
        sheet.paste(good, (margin, int(tops[row])))
        draw.text((margin, int(tops[row]) + good.height + 2), str(name)[-24:], MUTED, font(11))
        for column, kind in enumerate(KINDS, 1):
            left, top = margin + column * (side + margin), int(tops[row])
            try:
                item = draw_on(images[row], pictures[row], kind, generator(seed, name, 0, kind), pictures)
            except UserError:
                draw.text((left, top), "cannot be seen here", MUTED, font(11))
                continue
            shown = tile(to_pixels(item.image), side)
            around = ndimage.binary_dilation(item.mask[0].numpy() > 0, iterations=max(2, item.mask.shape[2] // 40))
            sheet.paste(shown, (left, top))
            sheet.paste(outlined(shown, around), (left, top + good.height + 2))
            draw.text((left, top + 2 * good.height + 3), f"{item.area:.2%} of the area, contrast {item.contrast:.2f}",
                      MUTED, font(11))
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = parsing.Parser(prog="python -m dbad.calibration --preview", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_path", type=parsing.path,
                        help="folder that holds the categories; default: the demo data")
    parser.add_argument("--item", type=parsing.text, required=True, help="category, of which only train/good is read")
    parser.add_argument("--out", type=parsing.path, required=True, help="picture to write, such as sheet.png")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--intensity", default="auto", help="of images of more than 8 bits, as for the other scripts")
    parser.add_argument("--rows", type=int, default=6, help="good images to show")
    parser.add_argument("--seed", type=int, default=0, help="every anomaly follows from it")
    with one_line_failures():
        args = parser.parse_args(argv)
        options = RunOptions(item=args.item, dataset_path=args.dataset_path, intensity=args.intensity, seed=args.seed)
        check(options)
        check_value("resolution", args.resolution, {"least": 8, "most": 4096})
        if args.resolution < 16 or args.rows < 1:
            raise UserError(f"--resolution {args.resolution} --rows {args.rows}: expected at least 16 pixels and 1 row")
        category = open_category(options)
        count = min(args.rows, len(category.train))
        samples = [category.train[i * len(category.train) // count] for i in range(count)]      # evenly over the files
        intensity = run_intensity(options, {}, category.train)
        images = [to_float(image) for image in read_images(samples, args.resolution, intensity=intensity)]
        with atomic_write(args.out) as temporary:
            preview(images, [sample.path.name for sample in samples], args.seed).save(temporary, "PNG")
        print(f"The sheet is {args.out}")
