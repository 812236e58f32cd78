"""List the samples in folders of images: the images in sub-folders, and the mask of each image.

A mask is found by the name of its image: 000_mask.png, 000_GT.png or 000.png for 000.png, in the folder of the ground
truth that corresponds to the image's own. A folder 000/ there holds several masks of one image (MVTec LOCO). If the
names are unique, the folders may differ. A mask may also lie among the images, as 000_mask.png, 000_GT.png, or in a
folder called mask, masks or gt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dbad.data.finding import counted, files_below, list_images, shortened
from dbad.errors import UserError
from dbad.files.special import special_kind
from dbad.records import Category, Sample

Found = tuple[tuple[str, ...], Callable[[str], Category]]      # names of the categories, function that lists one
MASK_FOLDERS = frozenset({"mask", "masks", "gt", "ground_truth", "groundtruth"})      # in any case


class Images(NamedTuple):
    """The files with an image's file name in a folder and below: the images, and the masks that lie among them."""

    images: list[Path]
    masks: list[Path]


class Match(NamedTuple):
    """The mask of each image, the masks that give way to another one for the same image, and those without an image."""

    masks: dict[Path, Path]
    second: list[Path]
    unused: list[Path]


def good_samples(folder: Path, name: str, root: Path, notes: list[str], grouped: bool = False) -> list[Sample]:
    """The good images in a folder and below; if `grouped`, those of a sub-folder are one group.

    Masks among them have no meaning and are left out. Lines for the user are added to `notes`, with paths relative to
    `root`.
    """
    images, masks = read_folder(folder, root, notes)
    if masks:
        notes.append(f"{counted(len(masks), 'mask')} of good images left out ({shortened(masks, root)})")
    groups = {path: _group(path, folder) for path in images}
    if not grouped or len({*groups.values()}) == 1:     # all in one folder: no reason to split by folder
        return [Sample(path, name, "good") for path in images]
    if images:
        notes.append(f"{_below(folder, root)}: images in {counted(len({*groups.values()} - {None}), 'sub-folder')}, "
                     "each of them trained on or held out as a whole")
    return [Sample(path, name, "good", group=group) for path, group in groups.items()]


def defect_samples(folder: Path, defect: str, truth: Path | None, name: str, root: Path,
                   notes: list[str]) -> list[Sample]:
    """The images of a defect in a folder and below, with the masks that lie in the folder `truth` or among the images.

    An image without a mask gets the path of the file that is missing in `truth`; without `truth`, None.
    """
    images, beside = read_folder(folder, root, notes)
    masks = read_files(truth, root, notes) if truth else []
    found, among = match(images, folder, masks, truth or folder), match(images, folder, beside, folder)
    taken = [path for image, path in among.masks.items() if image not in found.masks]
    for paths, what in (
            (taken, "among the images, used as their masks"),
            ([path for image, path in among.masks.items() if image in found.masks],
             "among the images left out, as the ground truth has its own"),
            (found.second + among.second, "left out, as the image has another one"),
            (found.unused + among.unused, "left out, as no image has that name")):
        if paths:
            notes.append(f"{counted(len(paths), 'mask')} {what} ({shortened(sorted(paths), root)})")

    def mask_of(path: Path) -> Path | None:
        looked_for = truth and truth / path.relative_to(folder).with_name(f"{path.stem}_mask.png")
        return found.masks.get(path) or among.masks.get(path) or looked_for
    return [Sample(path, name, defect, mask_of(path)) for path in images]


def read_folder(folder: Path, root: Path, notes: list[str]) -> Images:
    """The images and masks in a folder and below; named pipes, sockets and devices are left out and noted."""
    return split_masks(folder, read_files(folder, root, notes))


def read_files(folder: Path, root: Path, notes: list[str], recursive: bool = True) -> list[Path]:
    """The files with an image's file name in a folder and, if `recursive`, below; sorted as by `files_below`.

    Named pipes, sockets and devices are left out, which a line in `notes` says.
    """
    files = files_below(folder, recursive)
    if files.special:
        notes.append(f"{len(files.special)} left out that {'is' if len(files.special) == 1 else 'are'} no file "
                     f"({shortened(files.special[:1], root)}: {special_kind(files.special[0])})")
    return files.images


def split_masks(folder: Path, files: Sequence[Path]) -> Images:
    """Divide files below `folder` into images and masks, by their names.

    x_mask.png is a mask if x.png or x.jpg lies beside it. It is also a mask without an image, if others there have one.
    """
    in_mask_folder = {path: any(part.lower() in MASK_FOLDERS for part in path.relative_to(folder).parts[:-1])
                      for path in files}
    if all(in_mask_folder.values()):        # then these files are the images
        in_mask_folder = dict.fromkeys(files, False)
    stems = {(path.parent, path.stem) for path in files}
    named = {path: (path.parent, bare) for path in files if (bare := _bare(path.stem)) != path.stem}
    pairs = {path.parent for path, bare in named.items() if bare in stems}
    images, masks = [], []
    for path in files:
        is_mask = in_mask_folder[path] or (path in named and path.parent in pairs)
        (masks if is_mask else images).append(path)
    return Images(images, masks)


def match(images: Sequence[Path], image_folder: Path, masks: Sequence[Path], mask_folder: Path) -> Match:
    """Find the mask of every image, all below their folders: by path, by a folder of its name, or by name alone."""
    wanted = {image: _key(image, image_folder) for image in images}
    known: dict[tuple[str, ...], list[Path]] = {}       # by the path of the image, x_mask.png before x.png
    for bare in (True, False):
        for mask in masks:
            *above, stem = _key(mask, mask_folder)
            if not bare or _bare(stem) != stem:
                known.setdefault((*above, _bare(stem) if bare else stem), []).append(mask)
    found = {image: known[key][0] for image, key in wanted.items() if key in known}
    second = list(dict.fromkeys(mask for image in found for mask in known[wanted[image]][1:]))

    # Several masks of one image, in a folder of its name.
    folders: dict[tuple[str, ...], list[Path]] = {}
    for mask in masks:
        folders.setdefault(_key(mask, mask_folder)[:-1], []).append(mask)
    parents = {key[:-1] for key in wanted.values()}
    used = {*found.values(), *second}
    for image, key in wanted.items():
        if image not in found and key in folders and key not in parents:
            found[image] = folders[key][0].parent
            used.update(folders[key])

    # By name, if exactly one image and one mask have it.
    rest = _by_name((image, wanted[image][-1]) for image in images if image not in found)
    names = _by_name((mask, _bare(mask.stem)) for mask in masks if mask not in used)
    for name in rest.keys() & names.keys():
        if len(rest[name]) == len(names[name]) == 1:
            found[rest[name][0]] = names[name][0]
            used.add(names[name][0])
    return Match(found, second, [mask for mask in masks if mask not in used])


def left_out(folders: Iterable[Path], kept: Collection[Path], root: Path, why: str, notes: list[str]) -> None:
    """Add to `notes` the folders that have images and are not in `kept`: their images are not read."""
    for folder in folders:
        count = 0 if folder in kept else len(files_below(folder).images)
        if count:
            notes.append(f"{_below(folder, root)}: {counted(count, 'image')} left out, {why}")


def loose_images(folder: Path, root: Path, expected: str, notes: list[str]) -> None:
    """Add to `notes` the images that lie in a folder itself, which are not read."""
    images = list_images(folder)
    if images:
        notes.append(f"{_below(folder, root)}: {counted(len(images), 'image')} left out; expected {expected} "
                     f"({shortened(images, root)})")


def refuse_masks(folder: Path, images: Sequence[Path]) -> None:
    """Raise `UserError` if masks seem to lie among images that are all taken as good."""
    stems: dict[str, list[str]] = {}
    for path in images:
        stems.setdefault(_bare(path.stem), []).append(path.name)
    both = next((names for names in stems.values() if len(names) > 1), None)
    if both is not None:
        raise UserError(f"{folder}: masks seem to lie among the images ({', '.join(both)}); expected images alone")


def _bare(stem: str) -> str:
    """The name without a mask's ending: 000_mask or 000_GT -> 000; other names as they are."""
    return re.sub(r"(?<=.)_(mask|gt)$", "", stem, flags=re.IGNORECASE)


def _key(path: Path, folder: Path) -> tuple[str, ...]:
    """The sub-folders and the stem of a path below a folder, without mask folders (`MASK_FOLDERS`)."""
    *above, _ = path.relative_to(folder).parts
    return (*(part for part in above if part.lower() not in MASK_FOLDERS), path.stem)


def _group(path: Path, folder: Path) -> str | None:
    above = path.parent.relative_to(folder).as_posix()
    return None if above == "." else above


def _by_name(pairs: Iterable[tuple[Path, str]]) -> dict[str, list[Path]]:
    names: dict[str, list[Path]] = {}
    for path, name in pairs:
        names.setdefault(name, []).append(path)
    return names


def _below(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()

