"""What preprocess_data.py is made of: sources of any kind -> records; a folder that is replaced in one step."""


class InputError(Exception):
    """What the user can mend, in one line: what is wrong, where, and what to do."""
