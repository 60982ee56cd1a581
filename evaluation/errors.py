"""The error that a user can mend."""


class UserError(Exception):
    """Its message is one line: what is wrong, where, and what to do. Scripts print it and exit with status 2."""
