"""What a report needs to inspect again with another threshold: the command, and the calibration to change."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from dbad.calibration.thresholds import Calibration
from dbad.files.names import CALIBRATION
from dbad.options.resolve import changed
from dbad.options.shared import RunOptions

# Options that say which images and which run; all others are those of the calibration.
_TOLD = ("item", "dataset_path", "layout", "run_id", "diffusion_checkpoint_dir", "img_dir", "item_states",
         "eval_resolution", "masks", "images", "recursive", "seed")


@dataclass(frozen=True)
class Again:
    """How a run is inspected again.

        command        the command line, without a threshold
        calibration    the thresholds of the run
        file           name of their file in the run folder
    """

    command: str
    calibration: Calibration
    file: str = CALIBRATION

    def as_dict(self) -> dict[str, Any]:
        """What the script in the report works on; the calibration is the text of its file."""
        text = json.dumps(self.calibration.as_dict(), indent=2, ensure_ascii=False) + "\n"
        return {"command": self.command, "file": self.file, "calibration": text,
                "scores": list(self.calibration.scores)}


def command_of(options: RunOptions, script: str) -> str:
    """The command line that inspects the same images with the same run, without a threshold."""
    words, different = ["python", script], changed(options)
    for name in _TOLD:
        value = different.get(name)
        if value in (None, False) or (name == "run_id" and value == options.item):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(shlex.quote(str(each)) for each in values)]
    return " ".join(words)
