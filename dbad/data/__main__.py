"""python -m dbad.data PATH: print the layout and the contents of a data set."""

from collections.abc import Sequence

from dbad.data.layouts.registry import LAYOUTS, describe, open_dataset
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures


def main(argv: Sequence[str] | None = None) -> None:
    parser = parsing.Parser(prog="python -m dbad.data",
                            description="Print how a data set is laid out and what is in it.")
    parser.add_argument("dataset_path", type=parsing.path, metavar="PATH", help="folder of the data set")
    parser.add_argument("--layout", default="auto", help=f"{', '.join(LAYOUTS)} (default: auto)")
    with one_line_failures():
        args = parser.parse_args(argv)
        print(describe(open_dataset(args.dataset_path, args.layout)))


if __name__ == "__main__":
    main()
