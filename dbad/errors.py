"""Failures that a user can cause."""


class UserError(Exception):
    """Something the user gave is wrong; the message is one line that names it, what was found and what was expected.

    Scripts print the message and exit with status 2, without a traceback (`dbad.config.main`).
    """
