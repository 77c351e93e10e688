"""The one exception that users cause and can fix, and how its messages show values and errors."""

__all__ = ["UserError", "shown", "shown_error"]


class UserError(ValueError):
    """Unusable input, in one line: option or file, what was given, what is allowed, what to do.

    The command line prints the line and exits with ``exit_code``.

    Attributes:
        exit_code: 2; 1 where training had begun.
    """

    exit_code = 2


def shown(value: object) -> str:
    """A value in a message, as Python writes it; a number of thousands of digits has no text."""
    try:
        return repr(value)
    except ValueError:  # Python's limit for the digits of a whole number
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a number"


def shown_error(error: Exception, *, limit: int = 200) -> str:
    """The text of a library's error in a message: one line of at most so many characters.

    An error without a text is shown by the name of its class.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
