"""The one error of this package that speaks to users."""


class UserError(RuntimeError):
    """Something the user can mend. The message is one line: the culprit, then the mend."""
