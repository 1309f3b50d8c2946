"""Sweeps made up for the report pages, and a browser to open them in: Chromium, driven over its DevTools pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import random
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STRATEGIES = ("naive", "replay", "er_ace", "derpp", "icarl", "memo")
BUDGETS = (50_000, 100_000, 200_000, 500_000, 1_000_000)
SEEDS = (0, 1, 2)
EXPERIENCES = 5
TIMEOUT = 60.0  # seconds for one answer of the browser


def make_sweep(
    strategies: tuple[str, ...] = STRATEGIES,
    budgets: tuple[int, ...] = BUDGETS,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, Any]:
    """A ``pareto.json`` with plausible numbers: accuracy grows with the budget, each method at its own pace."""
    source = random.Random(7)
    cells = []
    for (rank, strategy), budget, seed in itertools.product(enumerate(strategies), budgets, seeds):
        level = 0.28 + 0.09 * rank + 0.16 * (1 - 50_000 / budget) * (rank > 0) + source.gauss(0, 0.012)
        seen = [min(1.0, level + (1 - level) * (0.94 - 0.22 * i)) for i in range(EXPERIENCES - 1)] + [level]
        matrix = [
            [max(0.0, min(1.0, seen[i] + 0.1 * (j - i / 2))) if j <= i else 0.0 for j in range(EXPERIENCES)]
            for i in range(EXPERIENCES)
        ]
        replay = 0 if strategy == "naive" else int(budget * 0.9 * (0.7 + 0.05 * rank))
        weights, activations = 29_640, 26_000 + 5_200 * rank
        fisher = 29_640 if strategy in ("memo", "derpp") else 0
        peak = weights * 2 + activations + replay + fisher
        cells.append(
            {
                "id": f"{strategy}-{budget}-{seed}",
                "label": strategy,
                "strategy": strategy,
                "budget": budget,
                "memory_size": None,
                "seed": seed,
                "axes": {},
                "status": "complete",
                "error": None,
                "folder": f"cells/{strategy}-{budget}-{seed}",
                "metrics": {
                    "final_accuracy": level,
                    "average_accuracy": statistics.fmean(seen),
                    "forgetting": 0.9 - level,
                    "backward_transfer": level - 0.95,
                    "forward_transfer": None,
                },
                "memory": {
                    "weights": weights,
                    "trainable_weights": weights,
                    "gradients": weights,
                    "optimizer": 0,
                    "activations": activations,
                    "replay": replay,
                    "method_state": fisher,
                    "method_state.fisher": fisher,
                    "persistent": weights + replay + fisher,
                    "peak_static": peak,
                    "peak_measured": int(peak * 1.1) + source.randrange(0, 8192, 4096),
                },
                "accuracy_matrix": matrix,
                "accuracy_seen": seen,
                "time": {"train_s": 2.0 + 0.3 * rank + source.random(), "eval_s": 0.1},
            }
        )
    return {
        "schema": 1,
        "config": {
            "description": "Six methods for digits in the memory of a microcontroller.",
            "scenario": {"name": "class_incremental", "dataset": "digits", "n_experiences": 5},
            "model": {"name": "mlp", "hidden": 100},
            "methods": [{"name": name, "lr": 0.1} for name in strategies],
            "budgets": list(budgets),
            "seeds": list(seeds),
        },
        "environment": {"python": "3.11.7", "cpu_count": 2, "packages": {"torch": "2.15.0", "timm": None}},
        "axes": [],
        "cells": cells,
        **summarise(cells),
    }


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Groups, fronts and comparisons of cells, as a sweep writes them."""
    groups = []
    for (strategy, budget), found in itertools.groupby(cells, key=lambda cell: (cell["strategy"], cell["budget"])):
        members = [cell for cell in found if cell["status"] == "complete"]
        if not members:
            continue

        def spread(section: str, name: str, members: list[dict[str, Any]] = members) -> dict[str, Any]:
            values = [cell[section][name] for cell in members]
            if any(value is None for value in values):
                return {"mean": None, "sd": None, "low": None, "high": None, "n": 0}
            sd = statistics.stdev(values) if len(values) > 1 else None
            mean = statistics.fmean(values)
            return {"mean": mean, "sd": sd, "low": min(values), "high": max(values), "n": len(values)}

        groups.append(
            {
                "id": f"{strategy}@{budget}",
                **{key: members[0][key] for key in ("label", "strategy", "budget", "memory_size", "axes")},
                "seeds": [cell["seed"] for cell in members],
                "metrics": {name: spread("metrics", name) for name in members[0]["metrics"]},
                "memory": {name: spread("memory", name) for name in members[0]["memory"]},
            }
        )
    strategies = list(dict.fromkeys(group["strategy"] for group in groups))
    budgets = sorted({group["budget"] for group in groups if group["budget"] is not None})
    value = {(g["strategy"], g["budget"]): g["metrics"]["final_accuracy"]["mean"] for g in groups}
    paired = [
        {
            "a": a,
            "b": b,
            "budget": budget,
            "metric": "final_accuracy",
            "n": 3,
            "difference": value[a, budget] - value[b, budget],
            "low": value[a, budget] - value[b, budget] - 0.05,
            "high": value[a, budget] - value[b, budget] + 0.05,
            "p_value": 0.25,
        }
        for a, b in itertools.combinations(strategies, 2)
        for budget in budgets
        if (a, budget) in value and (b, budget) in value
    ]
    return {
        "groups": groups,
        "fronts": {},
        "hypervolume": {"persistent": {"final_accuracy": 0.61, "forgetting": 0.2}},
        "auc": {
            name: {"persistent": {"auc_a": 0.71 + 0.01 * i, "auc_l": 0.5 + 0.02 * i, "from": 5e4, "to": 1e6}}
            for i, name in enumerate(strategies)
        },
        "paired": paired,
    }


@pytest.fixture(scope="session")
def sweep_of() -> Callable[..., dict[str, Any]]:
    """:func:`make_sweep`."""
    return make_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a ``pareto.json`` and returns its folder."""

    def write(content: dict[str, Any]) -> Path:
        folder = tmp_path / "sweep"
        folder.mkdir(exist_ok=True)
        (folder / "pareto.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: replay on digits, two epochs per experience."""
    from contlearn import cli

    folder = tmp_path_factory.mktemp("report") / "digits_replay"
    options = ["--scenario.name=class_incremental", "--scenario.dataset=digits", "--scenario.n_experiences=5"]
    options += ["--model.name=mlp", "--strategy.name=replay", "--strategy.memory_size=100", "--strategy.epochs=2"]
    assert cli.main(["run", *options, "--out", str(folder), "--quiet"]) == 0
    return folder


# ---------------------------------------------------------------------- the browser


class Browser:
    """Headless Chromium over ``--remote-debugging-pipe``: JSON messages that end in a NUL, no socket, no driver."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-default-apps --disable-extensions --disable-dev-shm-usage "
        "--hide-scrollbars --force-color-profile=srgb --remote-debugging-pipe"
    )

    # The browser reads from descriptor 3 and writes to 4, whatever the pipes are called here.
    LAUNCH = (
        "import fcntl, os, sys\n"
        "ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD_CLOEXEC, 10) for end in sys.argv[1:3]]\n"
        "os.dup2(ends[0], 3)\n"
        "os.dup2(ends[1], 4)\n"
        "os.execv(sys.argv[3], sys.argv[3:])\n"
    )

    def __init__(self, executable: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = [*self.FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.LAUNCH, str(to_read), str(to_write), executable, *flags],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        waiting = b""
        while chunk := os.read(self._read, 1 << 20):
            *whole, waiting = (waiting + chunk).split(b"\0")
            for message in whole:
                self._messages.put(json.loads(message))
        self._messages.put(None)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come first are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") != number:
                self.events.append(answer)
                continue
            assert "error" not in answer, (method, answer["error"])
            result: dict[str, Any] = answer["result"]
            return result

    def wait_for(self, event: str, session: str) -> None:
        """Wait until an event of a page has come."""
        while not any(one.get("method") == event and one.get("sessionId") == session for one in self.events):
            self.events.append(self._next(event))

    def _next(self, what: str) -> dict[str, Any]:
        try:
            message = self._messages.get(timeout=TIMEOUT)
        except queue.Empty:
            raise AssertionError(f"the browser gave no answer to {what} in {TIMEOUT} s") from None
        assert message is not None, f"the browser ended before it answered {what}"
        return message

    def close(self) -> None:
        """End the browser."""
        if self.process.poll() is None:
            try:
                os.write(self._write, b'{"id":0,"method":"Browser.close"}\0')
                self.process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        os.close(self._write)


class Page:
    """A file opened in a tab of its own."""

    def __init__(self, browser: Browser, path: Path, *, width: int, height: int, dark: bool = False) -> None:
        self.browser = browser
        self.width, self.height = width, height
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.target = target
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.dark(dark)
        self.call("Page.navigate", url=path.resolve().as_uri())
        browser.wait_for("Page.loadEventFired", self.session)
        ready = "document.documentElement.dataset.ready"
        for _ in range(100):  # a tab that was just made may be without a width for a moment
            if self.value(ready) == "yes":
                break
            self.settle()
        assert self.value(ready) == "yes", self.problems()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def dark(self, on: bool) -> None:
        """Emulate a dark or a light desktop."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def settle(self) -> None:
        """Give the page time to draw what was asked for."""
        self.value("new Promise(done => setTimeout(() => requestAnimationFrame(() => done(1)), 50))")

    def choose(self, control: str, value: str) -> None:
        """Choose an entry of a drop-down list as a user does."""
        code = f"const c = document.getElementById({json.dumps(control)}); c.value = {json.dumps(value)};"
        code += " c.dispatchEvent(new Event('change', {bubbles: true})); return c.value;"
        taken = self.value(f"(() => {{ {code} }})()")
        assert taken == value
        self.settle()

    def click(self, selector: str) -> None:
        """Click the first element that matches."""
        self.value(f"document.querySelector({json.dumps(selector)}).click()")
        self.settle()

    def press(self, key: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.settle()

    def problems(self) -> list[Any]:
        """Errors and warnings on the console, exceptions, violations of the page's policy."""
        self.value("1")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, parameters = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(parameters["args"])
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"])
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for, apart from the page itself and what it carries inside."""
        found = [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in found if not url.startswith(("file:///", "data:", "blob:"))]

    def hover(self, selector: str) -> None:
        """Move the mouse over the first element that matches."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        self.settle()
        box = self.value(
            f"(() => {{ const b = {element}.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})()"
        )
        x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
        for step in (-2, -1, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)
        self.settle()

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.value("document.documentElement.scrollWidth")) - self.width

    def screenshot(self, path: Path, selector: str = "html") -> None:
        """A PNG of an element, at most 16,000 pixels of its height."""
        element = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        box = self.value(
            f"(() => {{ const b = {element}; return [b.x + scrollX, b.y + scrollY, b.width, b.height]; }})()"
        )
        clip = {"x": box[0], "y": box[1], "width": box[2], "height": min(16_000, box[3]), "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser that CONTLEARN_CHROMIUM names, or that is installed; without one these tests fail, not vanish."""
    named = os.environ.get("CONTLEARN_CHROMIUM")
    names = (named,) if named else ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.fail(
            f"no {' or '.join(names)} here: apt-get install chromium, CONTLEARN_CHROMIUM=PROGRAM, -m 'not browser'"
        )
    opened = Browser(executable, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a file at a width and height; at the end of a test every page must have kept quiet and to itself."""
    pages = []

    def opened(path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        pages.append(Page(browser, path, width=width, height=height, dark=dark))
        return pages[-1]

    yield opened
    for page in pages:
        assert page.problems() == []
        assert page.requests() == []
        page.close()
