"""The parts that every command line of the project shares: errors of one line, and no empty values."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from dbad.errors import printable


class Parser(argparse.ArgumentParser):
    """An argparse parser with errors of one line, which suggest the nearest flag for a misspelt one."""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0].split("=")[0] if unknown.strip() else repr(unknown)
            near = difflib.get_close_matches(flag, [f for a in self._actions for f in a.option_strings], 1)
            message = f"{flag}: no such option" + (f"; did you mean {near[0]}?" if near else "; see --help")
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def text(word: str) -> str:
    """The word unchanged; an empty one is refused: it often comes from an unset variable of the shell."""
    if not word:
        raise argparse.ArgumentTypeError("expected a value, found an empty text")
    return word


def path(word: str) -> Path:
    """The word as a path; an empty word is refused."""
    return Path(text(word))
