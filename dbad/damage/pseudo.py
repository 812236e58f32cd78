"""Pseudo-anomalies: good images with damage drawn on them, by which settings are chosen without any test image.

    python -m dbad.damage.pseudo --dataset_path data/mvtec --item screw --out sheet.png

draws a sheet of them to look at. `dbad.damage.kinds` holds the kinds of damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from dbad.damage import kinds
from dbad.damage.kinds import Picture, Site
from dbad.data.depth import run_intensity
from dbad.data.images import open_category, read_images, to_float, to_pixels
from dbad.diffusion.noise import image_stream, stream
from dbad.drawing import MUTED, PAPER, font, outlined, tile
from dbad.errors import UserError
from dbad.files.atomic import atomic_write
from dbad.options.checks import check
from dbad.options.command_line import RunOptions
from dbad.runtime import parsing
from dbad.runtime.device import one_line_failures

KINDS: tuple[str, ...] = tuple(kinds.KINDS)

AREA = 0.001, 0.05              # shares of the image's area to change, log-uniform; lines and spots follow their widths
CONTRAST = 0.06, 0.5            # drawn change in units of the full range, log-uniform
CHANGED = 4                     # 8-bit levels: a pixel belongs to the mask where its smoothed change is above
VISIBLE = 12                    # 8-bit levels of mean change on the mask that are seen on a smooth surface
MIN_PIXELS = 4                  # smaller masks are drawn again
MAX_DRAWS = 20


@dataclass(frozen=True)
class PseudoAnomaly:
    """A good image with one anomaly, and what of it was changed.

        image       (3, H, W) float32 in [-1, 1]; the good image where the mask is 0, on 8-bit levels where it is 1
        mask        (1, H, W) float32 in {0, 1}, 1 where the anomaly is
        kind        one of KINDS
        area        share of the image that the mask covers
        contrast    mean change of a masked pixel's most changed channel, 1 for the full range
    """

    image: Tensor
    mask: Tensor
    kind: str
    area: float
    contrast: float


def make(image: Tensor, kind: str, rng: np.random.Generator, sources: Sequence[Tensor] = ()) -> PseudoAnomaly:
    """Damage one good image (3, H, W) in [-1, 1]; `sources` are good images to cut from, by default itself.

    Raises `UserError` for a kind that cannot be seen on this image, as a blur cannot on an even surface.
    """
    if kind not in kinds.KINDS:
        raise ValueError(f"pseudo-anomaly {kind!r}: expected one of {', '.join(KINDS)}")
    picture = as_picture(image)
    return _make(image, picture, kind, rng, [as_picture(source) for source in sources] or [picture])


def make_all(images: Sequence[Tensor] | Tensor, names: Sequence[str] | None = None, seed: int = 0,
             per_image: int = len(KINDS)) -> list[PseudoAnomaly]:
    """`per_image` pseudo-anomalies for each good image (3, H, W) in [-1, 1], image by image.

    The kinds take turns over the images. An anomaly follows from the seed, its kind, and the image's name (its content
    without `names`), whatever the order; what is cut out comes from one of the images, ordered by name. Where a kind
    cannot be seen on an image, the next one takes its place.
    """
    keys = list(names) if names is not None else [
        f"{tuple(image.shape)} {image_stream(0, image).initial_seed()}" for image in images]
    if len(keys) != len(images):
        raise ValueError(f"{len(keys)} names for {len(images)} images")
    if names is not None and len(set(keys)) < len(keys):
        raise ValueError(f"names: {next(key for key in keys if keys.count(key) > 1)} occurs twice")
    pictures = {key: as_picture(image) for key, image in zip(keys, images, strict=True)}
    ranks = {key: rank for rank, key in enumerate(sorted(pictures))}
    sources = [pictures[key] for key in ranks]
    return [_make_one_of(image, pictures[key], ranks[key] * per_image + number, (seed, key, number), sources)
            for key, image in zip(keys, images, strict=True) for number in range(per_image)]


def _make_one_of(image: Tensor, picture: Picture, turn: int, key: tuple, sources: Sequence[Picture]) -> PseudoAnomaly:
    """The kind whose turn it is, or the next one that can be seen."""
    for kind in (KINDS[(turn + skipped) % len(KINDS)] for skipped in range(len(KINDS))):
        try:
            return _make(image, picture, kind, generator(*key, kind), sources)
        except UserError as error:
            failure = error
    raise failure


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """The random stream of one anomaly, which follows from `seed` and `keys` alone."""
    return np.random.default_rng(stream(seed, "pseudo", *keys).initial_seed())


def _make(image: Tensor, picture: Picture, kind: str, rng: np.random.Generator,
          sources: Sequence[Picture]) -> PseudoAnomaly:
    largest = min(AREA[1], max(2 * AREA[0], 0.15 * len(picture.places) / picture.cover.size))   # of a small object
    for failed in range(MAX_DRAWS):
        area = max(MIN_PIXELS, picture.cover.size * log_uniform(rng, AREA[0], largest))
        # What blurs or bends the surface needs something to blur or bend: the more draws failed, the rougher the place.
        candidates = [picture.pick(picture.places, rng) for _ in range(1 + failed)]
        rough, number = max((roughness(picture, at), i) for i, at in enumerate(candidates))
        contrast = log_uniform(rng, *CONTRAST) + rough
        here, pixels = kinds.KINDS[kind](Site(picture, sources, candidates[number], area, contrast, rng))
        if picture.gray:    # a gray camera sees no colour, nor the rounding errors by which channels may differ
            pixels = np.broadcast_to(pixels.mean(axis=2, keepdims=True), pixels.shape)
        before, after = (np.round(values.clip(0, 1) * 255).astype(np.uint8) for values in (here.pixels, pixels))
        found = changed_region(before, after, picture.side)
        if found is None:
            continue
        region, contrast = found
        mask = torch.zeros(1, *image.shape[1:])
        mask[0][here.box] = torch.from_numpy(region).float()
        damaged = image.clone().float()
        inside = damaged[(slice(None), *here.box)]
        damaged[(slice(None), *here.box)] = torch.where(
            torch.from_numpy(region), to_float(torch.from_numpy(after).permute(2, 0, 1)), inside)
        return PseudoAnomaly(damaged, mask, kind, float(region.sum() / picture.cover.size), contrast)
    raise UserError(f"pseudo-anomaly {kind}: not visible on this image of {image.shape[2]}x{image.shape[1]} px in "
                    f"{MAX_DRAWS} draws; expected an image with more structure")


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def changed_region(before: np.ndarray, after: np.ndarray, side: float) -> tuple[np.ndarray, float] | None:
    """Where two windows (h, w, 3) uint8 differ, (h, w) bool, and their mean difference there, 1 for the full range.

    None where too little is changed to be seen: a rough surface hides changes that do not alter its roughness. Crumbs
    below a twentieth of the largest part are left out; gaps inside belong to the region if they were touched, or are
    pinholes, where the new pixel happens to be the old one.
    """
    difference = np.abs(after.astype(np.float32) - before).max(axis=2)
    touched = difference > 0
    region = ndimage.gaussian_filter(difference, max(0.5, side / 256)) > CHANGED
    region &= touched
    region |= ndimage.binary_fill_holes(region) & (touched | ndimage.binary_closing(region, np.ones((3, 3))))
    labels, count = ndimage.label(region, np.ones((3, 3)))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    region = (20 * sizes >= sizes.max())[labels]
    contrast = difference[region].mean()
    around = ndimage.binary_dilation(region, iterations=3)
    was, now = (detail(values, side)[around].mean() for values in (before, after))
    seen = contrast >= 0.8 * VISIBLE and contrast + abs(now - was) >= VISIBLE + 0.6 * min(was, now)
    if not seen or region.sum() < MIN_PIXELS:
        return None
    return region, float(contrast / 255)


def detail(pixels: np.ndarray, side: float) -> np.ndarray:
    """How much each pixel (h, w, 3) of a picture of that side differs in brightness from those around it, (h, w)."""
    surface = pixels.mean(axis=2, dtype=np.float32)
    return np.abs(surface - ndimage.gaussian_filter(surface, max(1.0, side / 128)))


def roughness(picture: Picture, at: np.ndarray) -> float:
    """Mean detail of the surface around a place: what differs by less is hard to see there."""
    reach = max(3, round(0.04 * picture.side))
    box = tuple(slice(max(0, middle - reach), middle + reach + 1) for middle in at)
    return float(detail(picture.pixels[box], picture.side).mean())


# ---------------------------------------------------------------------------------------- the object

def as_picture(image: Tensor) -> Picture:
    """A good image (3, H, W) in [-1, 1] with its foreground, as `dbad.damage.kinds` takes it."""
    pixels = to_pixels(image).astype(np.float32) / 255
    ground = foreground(image)[0].numpy()
    margin = max(1.0, 0.008 * ground.size ** 0.5)
    cover, depth = np.ones(ground.shape, np.float32), np.full(ground.shape, np.inf)
    if not ground.all():
        cover = np.clip((margin + 1 - ndimage.distance_transform_edt(~ground)) / margin, 0, 1).astype(np.float32)
        depth = ndimage.distance_transform_edt(ground)
    places, rim = (np.flatnonzero(region).astype(np.int32) for region in (ground, depth == 1))
    gray = (pixels == pixels[..., :1]).all()
    return Picture(pixels, cover, depth > margin + 1, places, rim, bool(gray))


def foreground(image: Tensor) -> Tensor:
    """Where the object of a good image (3, H, W) in [-1, 1] lies, (1, H, W) bool; everywhere if it fills the frame.

    The background is a quadratic surface in each channel, fitted to an even border; the object is what differs from it.
    Of several thresholds the one counts at whose outline the difference rises steepest, relative to itself: shadows
    fade slowly, an object ends at an edge. A border that is not even, or an object that hardly differs: no background.
    """
    height, width = image.shape[-2:]
    scale = min(1.0, 128 / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = ((F.interpolate(image[None].float(), size, mode="area")[0] + 1) / 2).permute(1, 2, 0).numpy()
    everything = torch.ones(1, height, width, dtype=torch.bool)
    border = np.ones(size, bool)
    depth = max(1, min(size) // 40)
    border[depth:-depth, depth:-depth] = False
    if border.all():
        return everything
    difference, spread = _background_difference(pixels, border)
    best, chosen = 0.0, None
    slope = np.log(difference + spread)
    slope = np.hypot(ndimage.sobel(slope, 0), ndimage.sobel(slope, 1)) / 8
    for threshold in np.geomspace(3 * spread, max(0.3, 6 * spread), 12):
        solid = _solid(difference > threshold)
        outline = ndimage.binary_dilation(solid) ^ ndimage.binary_erosion(solid, border_value=1)
        if solid.mean() > 0.02 and outline.any() and slope[outline].mean() > best:
            best, chosen = slope[outline].mean(), solid
    if chosen is None or spread > 0.06:
        return everything
    inside, outside = np.median(difference[chosen]), difference[~ndimage.binary_dilation(chosen)]
    if inside < 5 * spread or outside.size == 0 or inside < 3 * np.quantile(outside, 0.9):
        return everything
    return F.interpolate(torch.from_numpy(chosen)[None, None].float(), (height, width), mode="nearest")[0] > 0


def _background_difference(pixels: np.ndarray, border: np.ndarray) -> tuple[np.ndarray, float]:
    """How far each pixel (h, w, 3) is from the background, (h, w), and how far half the border is, times 1.5."""
    y, x = (2 * axis / length - 1 for axis, length in zip(np.mgrid[:border.shape[0], :border.shape[1]] + 0.5,
                                                          border.shape, strict=True))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)
    weights = np.ones(border.sum())
    for _ in range(10):         # Cauchy's weights: what differs much, as an object across the border, hardly counts
        fit = np.linalg.lstsq(terms[border] * weights[:, None], pixels[border] * weights[:, None], rcond=None)[0]
        difference = np.abs(pixels - terms @ fit).max(axis=2)
        spread = 1.5 * float(np.median(difference[border])) + 1 / 255
        weights = 1 / np.hypot(difference[border], spread)
    return difference, spread


def _solid(region: np.ndarray) -> np.ndarray:
    """The large parts of a region (h, w) bool, without crumbs, bridged and filled."""
    region = ndimage.binary_opening(region)
    labels, count = ndimage.label(ndimage.binary_closing(region, iterations=max(1, max(region.shape) // 64)) | region)
    if count == 0:
        return region
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes((10 * sizes >= sizes.max())[labels])


# ---------------------------------------------------------------------------------------- the sheet

def preview(images: Sequence[Tensor], names: Sequence[str], seed: int = 0, side: int = 192) -> Image.Image:
    """A sheet with a row for each good image and a column for each kind: the damaged image, below it with an outline.

    `side` is the longer side of a tile in pixels. Under each pair stands what was changed: share of area, contrast.
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
                item = _make(images[row], pictures[row], kind, generator(seed, name, 0, kind), pictures)
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
    parser = parsing.Parser(prog="python -m dbad.damage.pseudo", description=__doc__.splitlines()[0])
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
        check(vars(args))
        if args.resolution < 16 or args.rows < 1:
            raise UserError(f"--resolution {args.resolution} --rows {args.rows}: expected at least 16 pixels and 1 row")
        options = RunOptions(item=args.item, dataset_path=args.dataset_path, intensity=args.intensity)
        category = open_category(options)
        count = min(args.rows, len(category.train))
        samples = [category.train[i * len(category.train) // count] for i in range(count)]      # evenly over the files
        intensity = run_intensity(options, {}, category.train)
        images = [to_float(image) for image in read_images(samples, args.resolution, intensity=intensity)]
        with atomic_write(args.out) as temporary:
            preview(images, [sample.path.name for sample in samples], args.seed).save(temporary, "PNG")
        print(f"The sheet is {args.out}")


if __name__ == "__main__":
    main()
