"""The one exception that means: the user can mend this; and what to quote of another's."""

__all__ = ["InputError", "reason"]


class InputError(ValueError):
    """A config, file or checkpoint of the user's is wrong; the message is one line that says what and how.

    The command line prints it without a traceback and exits with code 2.

    Example:
        >>> raise InputError("`num_loops` must be >= 1, got 0.")
        Traceback (most recent call last):
        ...
        looplm.errors.InputError: `num_loops` must be >= 1, got 0.
    """


def reason(error: Exception) -> str:
    r"""Return why something failed, in one line: the system's words, or the first line of the message.

    Example:
        >>> reason(FileNotFoundError(2, "No such file or directory", "a.ckpt")), reason(ValueError("one\ntwo"))
        ('No such file or directory', 'one')
    """
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return next(iter(str(error).splitlines()), "")
