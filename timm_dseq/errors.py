"""What is said to a user who made a mistake: one line that names what is wrong, then how to mend it."""

import difflib
from collections.abc import Iterable


class UserError(RuntimeError):
    """A mistake that the user can mend. The message is one line; commands print it without a traceback."""


def similar(name: str, known: Iterable[str]) -> str:
    """The end of a message on a mistyped name: ", maybe A or B", of the known names nearest to it; "" without any."""
    near = difflib.get_close_matches(name, known, 3)
    return f", maybe {' or '.join(near)}" if near else ""
