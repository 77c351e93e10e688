"""The one exception that users cause and can fix."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Unusable input, in one line: option or file, what was given, what is allowed, what to do.

    The command line prints the line and exits with ``exit_code``.

    Attributes:
        exit_code: 2; 1 where training had begun.
    """

    exit_code = 2
