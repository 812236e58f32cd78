"""Failures that a user can cause."""

import unicodedata

_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})      # control characters, lone surrogates, separators of lines


def printable(text: object) -> str:
    """The text in one line that any terminal may be shown: what would break it is written as in Python, `\\n`."""
    return "".join(character.encode("unicode_escape").decode("ascii")
                   if unicodedata.category(character) in _ESCAPED else character for character in str(text))


class UserError(Exception):
    """Something the user gave is wrong; the message is one line that names it, what was found and what was expected.

    Scripts print the message and exit with status 2, without a traceback. Whatever names and
    values are in it, it stays one line, see `printable`.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))
