"""The one exception that means "the user can mend this": the command lines turn it into one line and exit code 2."""


class UserError(ValueError):
    """Says what was expected, what was found and what to do; never a defect of ours."""
