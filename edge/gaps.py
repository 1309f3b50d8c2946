"""The error for everything in a step that a target cannot run."""

from __future__ import annotations

from contlearn.errors import ContlearnError


class Gaps(ContlearnError):
    """Everything in a step that a target cannot run.

    Args:
        found: one line each: the operator, where it is used and the way out.
        target: name of the profile.
    """

    def __init__(self, found: list[str], target: str) -> None:
        self.found = found
        super().__init__(f"export to {target}: {len(found)} operators have no form there: {'; '.join(found)}")
