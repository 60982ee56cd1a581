"""The one error for mistakes that the user can correct."""


class UserError(Exception):
    """A mistake that the user can correct, in one line: what is wrong, where, and what to do."""
