"""python -m dbad.calibration --preview: a sheet of the pseudo-anomalies that --tune draws."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """python -m dbad.calibration --preview --item NAME --out SHEET.png"""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["--preview"]:
        print("python -m dbad.calibration: expected --preview --item NAME --out SHEET.png, a sheet of the "
              "pseudo-anomalies that --tune draws; see --preview --help", file=sys.stderr)
        raise SystemExit(2)
    from dbad.report.damage_sheet import main as preview
    preview(words[1:])


if __name__ == "__main__":
    main()
