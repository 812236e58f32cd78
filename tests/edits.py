"""Random edits of JSON files, as of a hand that slips or a disk that fails: the same ones for the same seed."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path

VALUES = (None, True, False, 0, -1, 1, 7, 10 ** 9, 2 ** 63, -2 ** 70, 0.5, -0.5, 1e308, -1e-308, "", "0.5", "nosuch",
          "nan", "a\nb", "../x", "\ud800", "x\0y", "ü" * 300, [], [None], [-1, 0.5], ["a"], [32] * 40, {}, {"a": 1})


def edited_bytes(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a JSON file after one random edit: of a value, a name, or the bytes themselves."""
    kind = rng.choice(["value"] * 12 + ["remove", "rename", "add", "twice", "raw", "raw", "cut", "bytes", "deep"])
    values = json.loads(content)
    if kind in ("value", "remove", "rename", "raw", "deep"):
        holder, key = rng.choice(list(_places(values)))
        if kind == "value":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        else:
            holder[key] = "MARK"
            raw = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "01", "nul", "'a'", "[1, 2,]"])
            raw = "[" * 2000 + "]" * 2000 if kind == "deep" else raw
            return json.dumps(values).replace('"MARK"', raw).encode()
        return json.dumps(values).encode()
    text = json.dumps(values, indent=2)
    if kind == "add":
        return json.dumps(values | {"wheels": 4}).encode()
    if kind == "twice":
        name = next(iter(values))
        return (text.rstrip()[:-1] + f', {json.dumps(name)}: {json.dumps(values[name])}}}').encode()
    if kind == "cut":
        return content[:rng.randrange(len(content))]
    return rng.choice([b"", b"[]", b"null", b"7", "﻿".encode() + content, text.encode("utf-16"), content + b"\xff",
                       bytes(rng.randrange(256) for _ in range(40)), content.replace(b",", b";", 1), b"\0" * 100])


def edit(path: Path, whole: bytes, rng: random.Random) -> bytes:
    """Write an edit of the contents `whole` into the file, and return it."""
    content = edited_bytes(whole, rng)
    path.write_bytes(content)
    return content


def _places(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """Every value in `value`, as what holds it and where."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(pairs):
        yield value, key
        yield from _places(entry)
