"""The cases of benchmarks.hostile: random options, broken images, damaged files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import socket
import struct
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from benchmarks.tiny_runs import COMMANDS, FOLDERS, without
from dbad.families.registry import FAMILIES

# ------------------------------------------------------------------------------------------ options

ODD = ("", " ", "nan", "inf", "-inf", "-1", "0", "1e308", "1e-308", "1" * 400, "x", "none", "ä", "..", "a/b", "a\nb",
       "--", "\udcff", "0x10", "1.5", "=SUM(A1)", "C" * 300)
LENGTHS = ("steps", "epochs", "_minutes", "patience", "num_samples", "start", "workers", "accumulate", "resolution",
           "channels", "batch", "components", "grid", "bank_mb", "seeds", "kernel")      # large values only take time


def random_command(chance: random.Random) -> list[str]:
    """A command that works, with one to three options more or otherwise, right and wrong ones."""
    words = list(chance.choice(chance.choice(list(COMMANDS.values()))))
    options = _options_of(words)
    hints, fields = typing.get_type_hints(options), [f for f in dataclasses.fields(options) if f.metadata["flag"]]
    for field in chance.choices(fields, k=chance.randint(1, 3)):
        flag = chance.choice([f"--{field.name}", *field.metadata["aliases"]])
        if chance.random() < 0.03:
            flag = flag[:-1] if chance.random() < 0.5 else flag + "x"
        values = _values(chance, field.name, hints[field.name])
        words = without(words, flag) if chance.random() < 0.5 else words
        words += [f"{flag}={values[0]}"] if values and chance.random() < 0.2 else [flag, *values]
    return words + ["--dry_run"] * (chance.random() < 0.2)


def _options_of(words: Sequence[str]) -> type:
    """The options that a command takes: those of its script, or of the method that it names."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    if not hasattr(script, "options_of") or "--method" not in words:
        return script.Options
    return script.options_of(FAMILIES[words[words.index("--method") + 1]])


def _values(chance: random.Random, name: str, hint: Any) -> list[str]:
    """Values for an option of this type: half of them likely ones, a tenth of another type."""
    if chance.random() < 0.1:
        return chance.choices(ODD, k=chance.choice((0, 1, 1, 1, 2)))
    kinds = [part for part in typing.get_args(hint) or (hint,) if part not in (type(None), Ellipsis)]
    many = chance.choice((1, 1, 2, 3)) if any(typing.get_origin(part) is tuple for part in (hint, *kinds)) else 1
    kind = next((part for part in kinds if typing.get_origin(part) is tuple), kinds[0])
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    if typing.get_origin(hint) is Literal or typing.get_origin(kind) is Literal:
        return [chance.choice(typing.get_args(hint if typing.get_origin(hint) is Literal else kind))]
    if kind is bool:
        return []
    takes_time, likely = any(part in name for part in LENGTHS), chance.random() < 0.6
    if kind is int:
        usual = ("1", "2", "3", "5", "8") if takes_time else ("0", "1", "2", "7", "64", "1000000")
        return chance.choices(usual if likely else ("-1", "0", "1.5", "-" + "9" * 30) + ("1" * 400,) * (
            not takes_time), k=many)
    if kind is float:
        usual = ("0", "0.01", "0.5", "1") if takes_time else ("0", "1e-6", "0.05", "0.5", "0.999", "1", "3")
        return chance.choices(usual if likely else ("nan", "inf", "-1", "1e-308") + ("1e308",) * (not takes_time),
                              k=many)
    usual = ("hazelnut", "data", "checkpoints", "results", "new", "all", "data/hazelnut/train/good")
    return chance.choices(usual if likely else ODD, k=many)


# ------------------------------------------------------------------------------------------ images

def spoil_images(chance: random.Random, work: Path) -> tuple[str, list[str]]:
    """Put an odd file among the images; what was done, and a command that meets it."""
    place = work / "data" / "hazelnut" / chance.choice(("train/good", "test/good", "test/crack", "ground_truth/crack"))
    there = sorted(place.iterdir()) if place.is_dir() else []
    path = chance.choice(there) if there and chance.random() < 0.7 else place / chance.choice(
        ("new.png", "new.tif", "new.jpg", "new.bmp", "nëw.png", "a\nb.png", "=1.png", "x" * 240 + ".png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    how = chance.choice(list(IMAGES))
    IMAGES[how](chance, path)
    method = chance.choice(("ddim", "lafite", "knn"))
    words = list(chance.choice([words for words in COMMANDS[method] if words[0].startswith(("train_", "inference_"))]))
    return f"{how} as {path.relative_to(work)}", words


def _bytes(chance: random.Random, path: Path) -> bytes:
    """Of the file, or of a drawn image where there is none."""
    if not path.is_file():
        Image.fromarray(_noise(chance, (32, 32, 3), np.uint8)).save(path, "PNG")
    return path.read_bytes()


def _noise(chance: random.Random, shape: tuple[int, ...], kind: type, top: int = 256) -> np.ndarray:
    return np.random.default_rng(chance.randrange(2 ** 32)).integers(0, top, shape).astype(kind)


def _replace(path: Path, make: Callable[[], object]) -> None:
    path.unlink(missing_ok=True)
    make()


def _save(path: Path, image: Image.Image, kind: str = "PNG", **how: Any) -> None:
    path.unlink(missing_ok=True)
    image.save(path, kind, **how)


def _flipped(chance: random.Random, content: bytes, count: int) -> bytes:
    found = bytearray(content)
    for place in chance.choices(range(len(found)), k=count if found else 0):
        found[place] ^= 1 << chance.randrange(8)
    return bytes(found)


def _huge(chance: random.Random, path: Path) -> None:
    """A file whose header promises more pixels than there can be."""
    content = bytearray(_bytes(chance, path))
    content[16:24] = struct.pack(">II", 10 ** 5, 10 ** 5)
    path.write_bytes(content)


def _socket(path: Path) -> None:
    short = os.path.relpath(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)       # such names may have 107 bytes
        try:
            server.bind(path.name[:100])
        finally:
            os.chdir(before)
    assert short


IMAGES: dict[str, Callable[[random.Random, Path], object]] = {
    "truncated": lambda c, p: p.write_bytes(_bytes(c, p)[:c.randint(1, 200)]),
    "empty": lambda c, p: p.write_bytes(b""),
    "bits flipped": lambda c, p: p.write_bytes(_flipped(c, _bytes(c, p), c.randint(1, 20))),
    "text": lambda c, p: p.write_text("not an image"),
    "header of 10 gigapixels": _huge,
    "12 bits in 16": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32), np.uint16, 4096))),
    "32 bits": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32), np.int32, 10 ** 6)), "TIFF"),
    "not a number": lambda c, p: _save(p, Image.fromarray(np.full((32, 32), np.nan, np.float32)), "TIFF"),
    "palette": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32, 3), np.uint8)).convert("P")),
    "alpha": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32, 4), np.uint8))),
    "one bit": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32), np.uint8)).convert("1")),
    "CMYK": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32, 3), np.uint8)).convert("CMYK"), "JPEG"),
    "animated": lambda c, p: _save(p, Image.new("P", (32, 32)), "GIF", save_all=True,
                                   append_images=[Image.new("P", (32, 32), 3)]),
    "one pixel": lambda c, p: _save(p, Image.new("RGB", (1, 1))),
    "other size": lambda c, p: _save(p, Image.new("RGB", (c.randint(2, 90), c.randint(2, 90)), "red")),
    "turned by EXIF": lambda c, p: _save(p, Image.new("RGB", (32, 20), "blue"), "JPEG", exif=_turned(c)),
    "soft JPEG": lambda c, p: _save(p, Image.fromarray(_noise(c, (32, 32), np.uint8)), "JPEG", quality=30),
    "folder": lambda c, p: _replace(p, p.mkdir),
    "pipe": lambda c, p: _replace(p, lambda: os.mkfifo(p)),
    "socket": lambda c, p: _replace(p, lambda: _socket(p)),
    "dangling link": lambda c, p: _replace(p, lambda: p.symlink_to("nowhere")),
    "link to itself": lambda c, p: _replace(p, lambda: p.symlink_to(p.name)),
    "name that is no UTF-8": lambda c, p: _save(Path(os.fsdecode(os.fsencode(p.parent) + b"/\xff\xfe.png")),
                                                Image.new("RGB", (32, 32))),
    "missing": lambda c, p: p.unlink(missing_ok=True),
}


def _turned(chance: random.Random) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = chance.randint(2, 8)
    return exif


# ------------------------------------------------------------------------------------------ files of a run

def spoil_run(chance: random.Random, work: Path) -> tuple[str, list[str]]:
    """Damage a file of a finished run; what was done, and a command that meets it."""
    method = chance.choice(list(FOLDERS))
    folder = work / "checkpoints" / chance.choice(FOLDERS[method])
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png",))
    json_files = [path for path in files if path.suffix == ".json"]
    path = chance.choice(json_files if chance.random() < 0.6 and json_files else files)
    how = "edited" if path.suffix == ".json" and chance.random() < 0.7 else chance.choice(list(FILES))
    what = _edit(chance, path) if how == "edited" else how
    if how != "edited":
        FILES[how](chance, path)
    return f"{what} in {path.relative_to(work)}", list(chance.choice(COMMANDS[method]))


def _edit(chance: random.Random, path: Path) -> str:
    """Change one place of a JSON file."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            places.append((value, key))
            walk(entry)
    walk(whole)
    if not places:
        path.write_text("[]")
        return "a list"
    container, key = chance.choice(places)
    if chance.random() < 0.15:
        del container[key]
        what = f"no {key}"
    else:
        container[key] = chance.choice([
            None, True, False, [], {}, "", "x", -1, 0, 1, 3, 1e308, -1e308, 10 ** 30, 10 ** 6, 0.5, "nan", [1, 2, 3],
            [None], {"a": 1}, float("nan"), float("inf"), "../../x", "a\nb", "\ud800", _deep(chance.choice((5, 3000)))])
        what = f"{key} = {str(container[key])[:40]!r}"
    path.write_text(_dumped(whole), encoding="utf-8", errors="surrogatepass")
    return what


def _deep(levels: int) -> Any:
    return f"@deep{levels}@"


def _dumped(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    for levels in (5, 3000):
        text = text.replace(f'"@deep{levels}@"', "[" * levels + "]" * levels)
    return text


FILES: dict[str, Callable[[random.Random, Path], object]] = {
    "truncated": lambda c, p: p.write_bytes(p.read_bytes()[:c.randrange(p.stat().st_size + 1)]),
    "empty": lambda c, p: p.write_bytes(b""),
    "one bit flipped": lambda c, p: p.write_bytes(_flipped(c, p.read_bytes(), 1)),
    "many bits flipped": lambda c, p: p.write_bytes(_flipped(c, p.read_bytes(), 50)),
    "text": lambda c, p: p.write_text("{}{"),
    "other encoding": lambda c, p: p.write_bytes("{\"ä\": 1}".encode("utf-16")),
    "byte order mark": lambda c, p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes()),
    "missing": lambda c, p: p.unlink(),
    "folder": lambda c, p: _replace(p, p.mkdir),
    "pipe": lambda c, p: _replace(p, lambda: os.mkfifo(p)),
    "link to itself": lambda c, p: _replace(p, lambda: p.symlink_to(p.name)),
    "another file": lambda c, p: p.write_bytes(c.choice([other for other in sorted(p.parent.iterdir())
                                                         if other.is_file()]).read_bytes()),
}
