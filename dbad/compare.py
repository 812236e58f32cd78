"""python -m dbad.compare RUN RUN: a page with the results of two runs on the same test images side by side."""

from collections.abc import Sequence
from pathlib import Path

from dbad.files.names import check_written
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures

PAGE = "compare.html"


def main(argv: Sequence[str] | None = None) -> None:
    """python -m dbad.compare results/screw results/screw-lafite --out compare.html"""
    parser = parsing.Parser(prog="python -m dbad.compare", description=(
        "Write a page with the maps of two runs side by side and the differences of their metrics, with 95 % "
        "intervals by a paired bootstrap over images. Both runs have to be of the same test images."))
    for name in ("first", "second"):
        parser.add_argument(name, type=parsing.path, metavar="RUN",
                            help="folder of results, such as results/screw; differences are second minus first")
    parser.add_argument("--out", type=parsing.path, default=Path(PAGE), help=f"page to write (default: {PAGE})")
    with one_line_failures():
        args = parser.parse_args(argv)
        check_written("out", args.out, PAGE)
        from dbad.report.comparison import write_comparison  # it loads torch, which --help does without
        print(write_comparison(args.first, args.second, args.out))


if __name__ == "__main__":
    main()
