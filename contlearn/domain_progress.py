"""What a test-time run shows while it works: the source model first, then domain by domain the error so far."""

from __future__ import annotations

from typing import Any

from contlearn.progress import Progress


class DomainProgress(Progress):
    """The progress of a test-time run, in stages (``source model``, ``domain``), each with a line per step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._what = "domain"

    def _forget_experience(self) -> None:
        super()._forget_experience()
        self._error: float | None = None
        self._source: float | None = None

    def stage(self, what: str, total: int, epochs: int = 1) -> None:
        """A stage of so many steps begins."""
        self._write_line()
        self._what = what
        self.start(total, epochs)

    def batch(self, k: int, n: int, error: float, source_error: float | None = None) -> None:
        """Batch ``k`` of ``n`` of the domain has been predicted; errors of all samples of it so far (0..1)."""
        self._error, self._source = error, source_error
        self.iteration(k, n)

    def visited(self, i: int, error: float, source_error: float | None = None) -> None:
        """Step ``i`` is over, with these errors on all of its samples."""
        self._error, self._source = error, source_error
        self.evaluated(i, 1 - error)

    def _parts(self, epoch: int) -> list[str]:
        of = f"/{self._total}" if self._total else ""
        parts = [f"{self._what} {self._index + 1}{of}" if self._total > 1 else self._what]
        if epoch and self._epochs > 1:
            parts.append(f"epoch {epoch}/{self._epochs}")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._error is not None:
            parts.append(f"error {self._error:.3f}")
        if self._source is not None:
            parts.append(f"source {self._source:.3f}")
        return parts
