"""The one error for mistakes that the user can correct, and the text of a library's error within it."""


class UserError(Exception):
    """A mistake that the user can correct, in one line: what is wrong, where, and what to do."""


def short_cause(error: Exception) -> str:
    """Return the first 100 characters of an error's message on one line, without the file's name of an OSError."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:100]
