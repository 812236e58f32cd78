"""What tiny runs of every method leave, as digests: the same before and after a change that shall change no number.

    python -m benchmarks.unchanged --out before.json                      (about five minutes on two cores)
    python -m benchmarks.unchanged --out after.json --against before.json

Weights, thresholds, scores.csv and the numbers of metrics.json of trainings and inspections on drawn data, from one
seed. They are comparable on one machine with one set of packages only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tiny_runs import FINISH, MACHINE

ROOT = Path(__file__).resolve().parents[1]
BOTH = ["--item", "hazelnut", "carpet", "--dataset_path", "data", *MACHINE]
TUNED = ("--preset demo --feature_resolution 32 --grid 4 --extractor_layers 0 1 --bank_mb 0.02 --components 8 "
         "--feature_channels 32 --steps_features 12 --feature_batch_size 4 --holdout 0.25 --feature_cache cache "
         "--tune_minutes 1000").split()
COMMANDS = {**FINISH,
            "ddim-images": ["inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data", *MACHINE, "--images",
                            "data/hazelnut/test/good"],
            "lafite-tuned": ["train_tune_eval.py", "--method", "lafite", *BOTH, *TUNED, "--run_id", "tuned"]}
WRITTEN = ("*.pt", "*.safetensors", "calibration*.json", "scores.csv", "metrics.json")
VARYING = ("seconds_per_image", "digests", "format")    # of a JSON file: times, and what only says which files belong


def main() -> None:
    """Run the commands and write the digests; with --against, name what differs and end with status 1 if anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file to write")
    parser.add_argument("--against", type=Path, metavar="JSON", help="file of another commit")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS), metavar="NAME",
                        help=f"of {', '.join(COMMANDS)} (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unchanged-") as folder:
        run_all(Path(folder), arguments.commands)
        found = dict(digests(Path(folder)))
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{len(found)} files in {arguments.out}")
    if arguments.against:
        known = json.loads(arguments.against.read_text())
        different = [name for name in sorted(known | found) if known.get(name) != found.get(name)]
        print("\n".join(f"differs: {name}" for name in different) or "nothing differs")
        raise SystemExit(bool(different))


def run_all(folder: Path, names: list[str]) -> None:
    """Draw the data and run the commands in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "home")}
    draw = ("from pathlib import Path; from dbad.data.demo import draw; "
            "draw.write_demo(Path('data'), ('hazelnut', 'carpet'), 32, 12, 4, 1)")
    subprocess.run([sys.executable, "-c", draw], cwd=folder, env=environment, check=True)
    for name in names:
        print("running", name, flush=True)
        script, *words = COMMANDS[name]
        subprocess.run([sys.executable, ROOT / script, *words], cwd=folder, env=environment, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """The digest of every file that counts, by its place."""
    for path in sorted(path for name in WRITTEN for path in folder.rglob(name)):
        place = path.relative_to(folder)
        if place.parts[0] not in ("checkpoints", "results") or "last" in path.stem:
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            values = json.loads(content)
            content = json.dumps({key: values[key] for key in sorted(values) if key not in VARYING}).encode()
        yield place.as_posix(), hashlib.blake2b(content, digest_size=16).hexdigest()


if __name__ == "__main__":
    main()
