"""Small data sets in every layout, for the tests of what reads them.

Files are empty where they need not be read, so that whatever is listed was not read.
"""

import json
from pathlib import Path

from helpers import save_drawn, save_mask

from dbad.records import Category


def put(root: Path, *names: str) -> Path:
    """Make empty files: whatever is listed was not read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def put_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def found(category: Category, base: Path) -> tuple[list[str], dict[str, tuple[str, str | None]]]:
    """The training images, and the test images with their defects and masks; paths relative to `base`."""
    def name(path):
        return path and path.relative_to(base).as_posix()
    return [name(s.path) for s in category.train], {name(s.path): (s.defect, name(s.mask)) for s in category.test}


def mvtec(root: Path) -> Path:
    return put(root, "bolt/train/good/000.png", "bolt/test/good/000.png", "bolt/test/crack/000.png",
               "bolt/ground_truth/crack/000_mask.png", "nut/train/good/a.png", "license.txt")


def btad(root: Path) -> Path:
    return put(root, "01/train/ok/0.bmp", "01/test/ok/1.bmp", "01/test/ko/2.bmp", "01/test/ko/3.bmp",
               "01/ground_truth/ko/2.png", "01/ground_truth/ko/3.bmp", "02/train/ok/0.png")


def mvtec_ad_2(root: Path) -> Path:
    return put(root, *(f"can/{name}.png" for name in (
        "train/good/000_regular", "train/good/001_overexposed", "validation/good/000_regular",
        "test_public/good/000_regular", "test_public/bad/000_regular", "test_public/bad/001_shift_1",
        "test_public/ground_truth/bad/000_regular_mask", "test_public/ground_truth/bad/001_shift_1_mask",
        "test_private/000_regular", "test_private_mixed/000_mixed")))


CSV = ("object,split,label,image,mask",
       "candle,train,normal,candle/Data/Images/Normal/0001.JPG,",
       "candle,train,normal,candle/Data/Images/Normal/0000.JPG,",
       "candle,test,normal,candle/Data/Images/Normal/0002.JPG,",
       "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png",
       "pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,")
VISA_FILES = ([f"candle/Data/Images/Normal/000{i}.JPG" for i in range(3)]
              + ["candle/Data/Images/Anomaly/000.JPG", "candle/Data/Masks/Anomaly/000.png",
                 "pcb1/Data/Images/Normal/0000.JPG"])
VISA_FOUND = (VISA_FILES[:2], {VISA_FILES[2]: ("good", None), VISA_FILES[3]: ("anomaly", VISA_FILES[4])})


def visa(root: Path) -> Path:
    put_lines(root / "split_csv" / "1cls.csv", *CSV)
    put_lines(root / "split_csv" / "0_2cls_fewshot.csv", CSV[0], CSV[4])
    return put(root, *VISA_FILES)


def tile(first: int, *kinds: str, exposures=range(1, 7), step: int = 20) -> list[str]:
    """The files of one tile of MTD; `kinds` by exposure, Free where none is given."""
    names = [f"MT_{kind}/Imgs/exp{e}_num_{first + step * i}"
             for i, (e, kind) in enumerate(zip(exposures, [*kinds, *["Free"] * 6], strict=False))]
    return [name + ending for name in names for ending in (".jpg", ".png")]


def mtd(root: Path) -> Path:
    return put(root, *tile(1000, "Free", "Crack"), *tile(2000, *["Blowhole"] * 6),
               *[name for i in range(12) for name in tile(3000 + 1000 * i)])


def ksdd2(root: Path) -> Path:
    for name, value in (("train/10000", 0), ("train/10001", 1), ("train/10002", 0), ("test/20000", 0),
                        ("test/20001", 255)):
        save_drawn(root / f"{name}.png")
        save_mask(root / f"{name}_GT.png", value=value)
    return put(root, "train/10001 (copy).png", "train/10001_GT (copy).png")     # as in the published archive


def line(name: str, label: int = 0, mask: str | None = None, **changes) -> str:
    value = {"filename": name, "label": label, "label_name": "scratched" if label else "good",
             "clsname": name.split("/")[0]} | ({"maskname": mask} if mask else {})
    return json.dumps(value | changes)


def manifest(root: Path) -> Path:
    put_lines(root / "train.json", line("bolt/b.png"), line("bolt/a.png"), line("nut/a.png"))
    put_lines(root / "test.json", line("bolt/t.png"), line("bolt/x.png", 1, "bolt/x_mask.png"), "",
              line("bolt/y.png", 1))
    return put(root, *(f"bolt/{name}.png" for name in ("a", "b", "t", "x", "x_mask", "y")), "nut/a.png")


def folder(root: Path) -> Path:
    return put(root, *(f"Good/{i}.png" for i in range(10)), "crack/a.png", "hole/a.png", "hole/b.jpg", "notes/a.txt")


TREES = {"mvtec": (mvtec, ("bolt", "nut")), "mvtec_ad_2": (mvtec_ad_2, ("can",)), "btad": (btad, ("01", "02")),
         "visa": (visa, ("candle", "pcb1")), "mtd": (mtd, ("magnetic_tile",)), "ksdd2": (ksdd2, ("kolektorsdd2",)),
         "manifest": (manifest, ("bolt", "nut")), "folder": (folder, ("parts",))}
