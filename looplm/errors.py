"""The one exception that means: the user can mend this."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A config, file or checkpoint of the user's is wrong; the message is one line that says what and how.

    The command line prints it without a traceback and exits with code 2.

    Example:
        >>> raise InputError("`num_loops` must be >= 1, got 0.")
        Traceback (most recent call last):
        ...
        looplm.errors.InputError: `num_loops` must be >= 1, got 0.
    """
