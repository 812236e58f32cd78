"""Published checkpoints -> run folders of this project.

    python -m dbad.checkpoints import downloads/screw --out checkpoints/screw

Three projects' files are known, by what they hold and not by what they are called:

    Diffusion-Based-AD   github.com/NilsB98/Diffusion-Based-AD: a folder with model_config.json, train_arg_config.json
                         and the state dict of a UNet2DModel; the state dict of a feature extractor
    DDAD                 github.com/arimousa/DDAD: the state dicts of a U-Net (2000) and of a feature extractor (feat4)
    DiAD                 arXiv:2312.06607: one .ckpt file with all of its networks

PATH is one of the files, or a folder with one U-Net, one feature extractor, or both. A second import with the same
--out adds what the first had not. DiAD's file has a folder to itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dbad.families.ddim.importing import import_ddim
from dbad.families.diad.weights import import_diad, is_diad_file
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `run`."""
    parser = parsing.Parser(prog="python -m dbad.checkpoints import", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=parsing.path, metavar="PATH", help="published file, or the folder it is in")
    parser.add_argument("--out", type=parsing.path, required=True,
                        help="run folder to write, such as checkpoints/screw")
    with one_line_failures():
        given = parser.parse_args(argv)
        print(run(given.path, given.out))


def run(path: Path, out: Path) -> str:
    """Convert what `path` holds into the run folder `out`; returns what was found and written, in sentences."""
    return import_diad(path, out) if is_diad_file(path) else import_ddim(path, out)
