"""What every command line of the project has in common: errors of one line, and no empty values."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from dbad.errors import printable


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and the nearest flag for a misspelt one."""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0].split("=")[0] if unknown.strip() else repr(unknown)
            near = difflib.get_close_matches(flag, [f for a in self._actions for f in a.option_strings], 1)
            message = f"{flag}: no such option" + (f"; did you mean {near[0]}?" if near else "; see --help")
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def text(word: str) -> str:
    """A word as it is; an empty one, as of an unset variable of the shell, would silently mean something else."""
    if not word:
        raise argparse.ArgumentTypeError("expected a value, found an empty text")
    return word


def path(word: str) -> Path:
    """A path, which is not empty."""
    return Path(text(word))
