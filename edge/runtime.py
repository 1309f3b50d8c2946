"""The runtime of artifacts, and the text of ``runner.py``: the modules of ``edge/runner/`` joined into one file.

On a device that file needs Python 3.10, NumPy and a stock ONNX Runtime: neither contlearn nor PyTorch.
"""

from __future__ import annotations

import ast
import functools
from importlib import resources

from contlearn.edge.runner.contract import MANIFEST, SCHEMA, check_manifest, load_manifest, verify_files
from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.guards import GUARDS
from contlearn.edge.runner.options import MEMORY_OPTIONS, PROVIDERS
from contlearn.edge.runner.program import main
from contlearn.edge.runner.replay import ReplayMemory
from contlearn.edge.runner.saved import StateFolder
from contlearn.edge.runner.session import Session
from contlearn.edge.runner.tensors import encode_tensors, read_tensors

__all__ = [
    "GUARDS",
    "MANIFEST",
    "MEMORY_OPTIONS",
    "PROVIDERS",
    "SCHEMA",
    "ReplayMemory",
    "RunnerError",
    "Session",
    "StateFolder",
    "check_manifest",
    "encode_tensors",
    "load_manifest",
    "main",
    "read_tensors",
    "runner_source",
    "verify_files",
]

# Each comes after those it imports.
PARTS = (
    *("errors", "tensors", "fields", "frames", "replay", "guards", "options", "sections", "contract"),
    *("saved", "shipped", "graph", "weights", "inputs", "learned", "session", "program"),
)
_PACKAGE = "contlearn.edge.runner"
_HEAD = '''"""Runs the artifact in this folder: adapts, predicts, and keeps what was learned through power cuts.

Needs Python 3.10, NumPy and a stock ONNX Runtime. In Python: ``Session(folder).step(frames, labels)``; as a program:
``python runner.py --help``. Made from the modules of contlearn/edge/runner; change those.
"""
'''
_TAIL = """

if __name__ == "__main__":
    sys.exit(main())
"""


@functools.cache
def runner_source() -> str:
    """The text of ``runner.py``: every import once at the top, then the parts in order, without their own imports."""
    imports: dict[str, set[str]] = {}
    bodies = []
    for part in PARTS:
        text = resources.files(_PACKAGE).joinpath(f"{part}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        title = (ast.get_docstring(tree) or part).splitlines()[0]
        first = next(node for node in tree.body[1:] if not isinstance(node, (ast.Import, ast.ImportFrom)))
        for node in tree.body:
            if isinstance(node, ast.Import):
                imports.setdefault(f"import {ast.unparse(node)[7:]}", set())
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(_PACKAGE):
                imports.setdefault(f"from {node.module} import", set()).update(ast.unparse(n) for n in node.names)
        # A comment, or a decorator, belongs to the statement that it stands above.
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#"):
            start -= 1
        bodies.append(f"\n\n# --- {title}\n\n" + "".join(lines[start:]).strip("\n") + "\n")
    future = "from __future__ import annotations\n\n"
    imports.pop("from __future__ import")
    whole = [f"{head} {', '.join(sorted(names))}".strip() for head, names in imports.items()]
    lines = sorted((line for line in whole if "numpy" not in line), key=lambda line: (line[0] == "f", line))
    standard = "\n".join(lines)
    return f"{_HEAD}\n{future}{standard}\n\nimport numpy as np\n" + "".join(bodies) + _TAIL
