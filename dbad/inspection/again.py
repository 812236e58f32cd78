"""How the run of the options is inspected again with another threshold."""

from __future__ import annotations

from dbad.calibration.thresholds import Calibration
from dbad.families.registry import FAMILIES
from dbad.families.runs import calibration_file
from dbad.files.atomic import known_json
from dbad.files.names import TRAIN_OPTIONS
from dbad.inspection.options import InspectionRun
from dbad.options.resolve import run_folder
from dbad.report.again import Again, command_of


def again_of(options: InspectionRun, calibration: Calibration) -> Again:
    """The command, the calibration and the name of its file, for the report."""
    folder = run_folder(options)
    learnt = known_json(folder / TRAIN_OPTIONS).get("item", [])
    several = learnt if isinstance(learnt, list) else []
    return Again(command_of(options, FAMILIES[calibration.method].scripts.inspection), calibration,
                 calibration_file(folder, options.item, several).name)
