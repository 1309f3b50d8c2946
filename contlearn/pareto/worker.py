"""A worker process of the local engine: takes sweeps to plan and cells to run as lines of JSON, answers likewise.

It ends when its standard input does, which the operating system sees to even when the sweep is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until the input ends."""
    # Whatever is printed goes to the log: the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()

    from contlearn.pareto.cell import execute, failure, warm_up

    warm_up()
    _answer(answers, {"event": "ready"})
    while True:
        task = tasks.get()
        if "sweep" in task:
            _answer(answers, _planned(task["sweep"]))
            continue
        try:
            record = execute(task["id"], task["config"], Path(task["folder"]))
        except KeyboardInterrupt:  # the run was asked to stop and has stored its position
            os._exit(0)
        except Exception as error:  # not even the record could be written
            record = failure(task["id"], f"{type(error).__name__}: {error}")
        _answer(answers, {"event": "ended", "record": record})


def _listen(tasks: queue.SimpleQueue[dict[str, Any]]) -> None:
    with contextlib.suppress(ValueError):
        for line in sys.stdin:
            tasks.put(json.loads(line))
    os._exit(0)


def _planned(content: dict[str, Any]) -> dict[str, Any]:
    from contlearn.errors import ContlearnError
    from contlearn.pareto.plan import expand
    from contlearn.pareto.specification import check

    try:
        return {"event": "planned", "cells": [cell.as_dict() for cell in expand(check(content))]}
    except ContlearnError as error:
        return {"event": "refused", "error": str(error)}


def _answer(answers: Any, message: dict[str, Any]) -> None:
    try:
        answers.write(json.dumps(message) + "\n")
        answers.flush()
    except OSError:  # nobody listens any more
        os._exit(0)
