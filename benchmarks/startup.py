"""Start-up: wall time of whole processes against an empty interpreter.

    python benchmarks/startup.py [--repeats 7]

Targets: `import contlearn` under 0.3 s, `contlearn --help` under 0.5 s, `contlearn list` and `doctor` under 3 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import common

COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": (["-c", "pass"], None),
    "import contlearn": (["-c", "import contlearn"], 0.3),
    "contlearn --help": (["-m", "contlearn.cli", "--help"], 0.5),
    "contlearn list strategies": (["-m", "contlearn.cli", "list", "strategies"], 3.0),
    "contlearn list datasets": (["-m", "contlearn.cli", "list", "datasets"], 3.0),
    "contlearn doctor": (["-m", "contlearn.cli", "doctor"], 3.0),
}


def main() -> int:
    """Run, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/startup.json)")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    for label, (command, target) in COMMANDS.items():
        seconds = []
        for _ in range(arguments.repeats + 1):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        met = target is None or median < target
        rows[label] = {"seconds": seconds[1:], "median": median, "target": target, "met": met}
        goal = "" if target is None else f"target {target} s  {'met' if met else 'MISSED'}"
        print(f"{label:28} {median:.3f} s  ({min(seconds[1:]):.3f}-{max(seconds[1:]):.3f})  {goal}")
    print(f"written to {common.write('startup', {'rows': rows}, arguments.out)}")
    return 0 if all(row["met"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
