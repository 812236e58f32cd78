"""python -m dbad.checkpoints import PATH --out FOLDER: published weights as a run folder."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """python -m dbad.checkpoints import PATH --out FOLDER"""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["import"]:
        print("python -m dbad.checkpoints: expected import PATH --out FOLDER; see import --help", file=sys.stderr)
        raise SystemExit(2)
    from dbad.families.import_weights import main as import_weights
    import_weights(words[1:])


if __name__ == "__main__":
    main()
