"""The one exception that reaches a user: what came, what was expected, how to mend it."""


class TideError(ValueError):
    """A problem that the user can mend.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, what: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.what, self.expected, self.fix = what, expected, fix
        parts = [what]
        if expected is not None:
            parts.append(f"expected: {expected}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__("\n  ".join(parts))


class Unusable(TideError):
    """A row of data that cannot be used.

    It is left out and counted under `reason`; it never stops a run by itself.
    """

    def __init__(self, reason: str, what: str | None = None) -> None:
        self.reason = reason
        fix = "mend the data, or choose a model whose chat template takes it as it is"
        super().__init__(what or reason, fix=fix)
