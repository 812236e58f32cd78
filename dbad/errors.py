"""Failures that a user can cause."""

import unicodedata

_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})      # control characters, lone surrogates, separators of lines


def printable(text: object) -> str:
    """The text in one line that any terminal can show: control characters are escaped as in Python, `\\n`."""
    return "".join(character.encode("unicode_escape").decode("ascii")
                   if unicodedata.category(character) in _ESCAPED else character for character in str(text))


class UserError(Exception):
    """An error in what the user gave; the message names it in one line, with what was found and what was expected.

    Scripts print the message and exit with status 2, without a traceback. It stays one line whatever names and values
    it contains, see `printable`.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))
