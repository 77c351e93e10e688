"""The one exception that users cause and can repair."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Unusable input, in one line: option or file, what came, what is allowed, what to do.

    The command line prints the line and exits with code 2.
    """
