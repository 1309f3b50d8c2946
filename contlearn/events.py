"""``events.jsonl``: the raw, append-only records of a run, one JSON object per line.

Everything a run reports is derived from these records by pure functions (``contlearn.metrics``, ``contlearn.results``).
Every record has ``event`` (its kind) and ``time`` (unix seconds); more fields than the listed ones are allowed.

===========  ==========================================================================================================
event        fields
===========  ==========================================================================================================
run          ``schema`` 1, ``strategy``, ``scenario``, ``seed``, ``classes_per_experience`` (class ids of every *test*
             experience), ``class_names``, ``environment``, ``joint``
evaluation   ``after`` (training experience, -1 before any training), ``on`` (test experience), ``n`` samples,
             ``correct`` (all classes seen so far competing), ``correct_local`` (only the test experience's own
             classes), ``correct_upto`` (classes of test experiences 0..``on``), ``loss`` (mean) or null
epoch        ``experience``, ``epoch``, ``loss`` (mean), ``iterations``, ``lr``, ``seconds``
experience   ``experience``, ``train_s``, ``eval_s``, ``samples``, ``iterations``
memory       ``after`` (experience or domain visit), and bytes by component
resume       ``experience`` or ``visit``
interrupted  (free)
end          (free)
===========  ==========================================================================================================

A test-time run has ``kind`` ``test-time`` and ``domains`` (names of all visits) in ``run``, no classes, and in place of
evaluations, epochs and experiences

===========  ==========================================================================================================
source       ``origin`` of the source weights: ``file``, ``cache`` or ``training``
domain       ``visit``, ``name``, ``n`` samples, ``errors`` of the adapter and ``source_errors`` of the source model on
             them, ``batches``, ``seconds`` in the adapter, of these ``watched_s`` in the ``watched`` batches that the
             memory account measured, ``trips`` of the guards, and where several domains are mixed ``by_domain``
             (``n``, ``errors``, ``source_errors`` by name)
===========  ==========================================================================================================

A killed run that resumes repeats some records: the last one with the same key counts (:func:`latest`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from contlearn.errors import ContlearnError
from contlearn.files import unwritable

FILE_NAME = "events.jsonl"

Event = Mapping[str, Any]


class EventLog:
    """An append-only log at ``path``; use it as a context manager.

    Each :meth:`append` hands one whole line to the operating system, so a killed process loses at most the line it was
    writing. Opening an existing log cuts such a torn line off.

    Raises:
        ContlearnError: the file cannot be opened or written, or an existing one holds a damaged line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Unbuffered: nothing waits in this process when it is killed.
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            raise unwritable(self.path, error) from error
        try:
            self._mend()
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> None:
        data = _load(self.path)
        _parse(data, self.path)
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        try:
            if _torn(data[end:]):
                self._file.truncate(end)
            else:  # a whole record that lost only its line end, say in an editor
                self._file.write(b"\n")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def append(self, event: str, **fields: Any) -> None:
        """Write one record: ``event``, ``time`` (unix seconds) and ``fields``.

        Values are JSON types; numpy and torch scalars become Python numbers, tuples become lists, and a float that is
        not finite becomes null, which strict JSON has in place of NaN and infinity.

        Raises:
            TypeError: a value that JSON cannot hold, or a field named ``time``. Nothing is written.
            ContlearnError: the write failed (a full disk, say). The log holds whole lines still.
        """
        if "time" in fields:
            raise TypeError("the field 'time' is set by the log")
        record = {"event": event, "time": time.time()}
        record.update((name, _plain(value, name)) for name, value in fields.items())
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            try:
                self._file.truncate(start)
            except OSError:  # the next opening cuts the torn line off
                self._file.close()
            raise unwritable(self.path, error) from error

    def sync(self) -> None:
        """Wait until every record is on the disk, which :meth:`append` alone does not promise after a power cut."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of the log at ``path``, in order; a torn last line is left out.

    Raises:
        ContlearnError: no such file, or a damaged line, named by file and line number.
    """
    return _parse(_load(Path(path)), Path(path))


def latest(events: Iterable[Event], event: str, *keys: str) -> dict[tuple[Any, ...], Event]:
    """The records of one kind by the values of ``keys``, the last one of each key (a resumed run repeats some).

    Raises:
        ContlearnError: a record without one of the keys.
    """
    found: dict[tuple[Any, ...], Event] = {}
    for record in events:
        if record["event"] == event:
            found[tuple(field(record, key) for key in keys)] = record
    return found


def field(record: Event, name: str, kind: type | tuple[type, ...] = object) -> Any:
    """``record[name]``, or a ContlearnError that names the field that is missing or of another type than ``kind``."""
    try:
        value = record[name]
    except KeyError:
        raise ContlearnError(f"damaged events: a record {record['event']!r} has no field {name!r}") from None
    if not isinstance(value, kind):
        raise ContlearnError(f"damaged events: a record {record['event']!r} has {name!r} = {value!r}")
    return value


def run_record(events: Iterable[Event]) -> Event:
    """The (last) record ``run``.

    Raises:
        ContlearnError: there is none.
    """
    found = latest(events, "run")
    if not found:
        raise ContlearnError("damaged events: no record 'run' (expected as the first record of a run)")
    return found[()]


def _load(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ContlearnError(f"cannot read {str(path)!r}: {reason}") from error


def _parse(data: bytes, path: Path) -> list[dict[str, Any]]:
    *lines, tail = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(line))
        except ValueError as error:
            raise ContlearnError(f"{path}, line {number}: not a record of a run ({error})") from error
    if not _torn(tail):
        records.append(_record(tail))
    return records


def _torn(tail: bytes) -> bool:
    """Whether the bytes after the last line end are no whole record."""
    try:
        _record(tail)
    except ValueError:
        return True
    return False


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        raise ValueError("expected a JSON object with a text 'event'")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _plain(value: Any, name: str) -> Any:
    """``value`` as strict JSON types; ``name`` is where it stands in the record, for the error."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: expected text as key, got {key!r}")
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    scalar = getattr(value, "item", None)
    if callable(scalar) and getattr(value, "shape", None) == ():  # numpy and torch scalars, and 0-d arrays
        number = scalar()
        if isinstance(number, (bool, int, float, str)):
            return _plain(number, name)
    raise TypeError(f"{name}: expected text, a number, a bool, None, a list or a dict, got {type(value).__name__}")
