"""The one error an operator sees: a sentence that says what is wrong and what to do."""


class CommandError(Exception):
    """The command cannot go on. Shown as it is, without a traceback; the exit code is 1."""
