"""ONNX Runtime: graphs of one or several segments bound to fixed buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError

ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")  # state stays in GPU memory between steps


class Buffer:
    """A tensor that ONNX Runtime reads or writes where it lies; on the CPU, ``array`` is the same memory."""

    def __init__(self, ort: Any, array: np.ndarray, device: str = "cpu") -> None:
        self.array = np.require(array, requirements=["C", "A"])
        self.value = ort.OrtValue.ortvalue_from_numpy(self.array, device, 0)
        same = not self.array.size or self.value.data_ptr() == self.array.ctypes.data
        self.shared = device == "cpu" and same

    def read(self) -> np.ndarray:
        """The content; on the CPU not a copy."""
        return self.array if self.shared else self.value.numpy()

    def write(self, content: Any) -> None:
        """Replace the content."""
        self.array[...] = content
        self.push()

    def push(self) -> None:
        """Make changes of ``array`` known to ONNX Runtime, where the memory is not the same."""
        if not self.shared:
            self.value.update_inplace(self.array)


_ORT_TYPES = {"float": "float32", "double": "float64"}


class Graph:
    """The segments of one graph, run in turn; a value that a later segment needs is passed on by its name.

    Outputs are written straight into the buffers given. Where an execution provider cannot do that, ``in_place`` turns
    False and the results are copied instead.
    """

    def __init__(
        self,
        ort: Any,
        paths: Sequence[Path],
        options: Any,
        providers: list[tuple[str, dict[str, Any]]],
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
        opset: int,
    ) -> None:
        self.paths, self.in_place = paths, True
        self.sessions = [self._open(ort, path, options, providers, opset) for path in paths]
        self.device = "cuda" if providers[0][0] in ON_CUDA else "cpu"
        known = {spec["name"]: spec for spec in inputs}
        wanted = {spec["name"]: spec for spec in outputs}
        self.takes = [[node.name for node in session.get_inputs()] for session in self.sessions]
        self.gives: list[list[str]] = []
        for index, (path, session) in enumerate(zip(paths, self.sessions, strict=True)):
            for node in session.get_inputs():
                if node.name not in known:
                    raise RunnerError(f"{path.name}: input {node.name!r} is neither in the manifest nor made before")
                self._match(path, "input", node, known[node.name])
            given = []
            for node in session.get_outputs():
                if node.name in wanted:
                    self._match(path, "output", node, wanted[node.name])
                later = any(node.name in takes for takes in self.takes[index + 1 :])
                if node.name in wanted or later:
                    given.append(node.name)
                known.setdefault(node.name, {"shape": list(node.shape), "dtype": _dtype_of(node)})
            self.gives.append(given)
        for name in wanted:
            if not any(name in given for given in self.gives):
                files = ", ".join(path.name for path in paths)
                raise RunnerError(f"{files}: no output {name!r}, which the manifest names")
        self._bindings: dict[Any, Any] = {}

    @staticmethod
    def _open(ort: Any, path: Path, options: Any, providers: list[tuple[str, dict[str, Any]]], opset: int) -> Any:
        try:
            session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            if re.search(r"(?i)opset \d+ is|IR version", str(error)):
                old = f"onnxruntime {ort.__version__} is too old for {path.name} (opset {opset})"
                raise RunnerError(f"{old}; expected a newer onnxruntime") from error
            raise RunnerError(f"onnxruntime {ort.__version__} cannot load {str(path)!r}: {str(error)[:300]}") from error
        if providers[0][0] not in session.get_providers():
            raise RunnerError(f"providers: {providers[0][0]} did not start; onnxruntime uses {session.get_providers()}")
        return session

    @staticmethod
    def _match(path: Path, kind: str, node: Any, spec: Mapping[str, Any]) -> None:
        found = (_dtype_of(node), list(node.shape))
        if found != (spec["dtype"], spec["shape"]):
            what, expected = f"{path.name}: {kind} {node.name!r}", f"{spec['dtype']} {spec['shape']}"
            raise RunnerError(f"{what} is {found[0]} {found[1]}, the manifest says {expected}")

    def run(self, key: Any, feeds: Mapping[str, Buffer], targets: Mapping[str, Buffer]) -> None:
        """Run all segments.

        Args:
            key: the same for calls with the same buffers.
            feeds: the inputs by name.
            targets: where the outputs go.
        """
        if self.in_place:
            try:
                if self._run_bound(key, feeds, targets):
                    return
            except Exception:  # whatever it was: if it is not the binding, it comes back below
                pass
            self.in_place = False
            self._bindings.clear()
        results = self.run_copied({name: feeds[name].read() for takes in self.takes for name in takes if name in feeds})
        for name, target in targets.items():
            target.write(results[name])

    def _run_bound(self, key: Any, feeds: Mapping[str, Buffer], targets: Mapping[str, Buffer]) -> bool:
        """Whether every output came to lie in its target."""
        passed: dict[str, Any] = {}
        for index, session in enumerate(self.sessions):
            binding = self._bindings.get(key)
            if fresh := binding is None:
                binding = session.io_binding()
                for name in self.takes[index]:
                    binding.bind_ortvalue_input(name, passed[name] if name in passed else feeds[name].value)
                for name in self.gives[index]:
                    if name in targets:
                        binding.bind_ortvalue_output(name, targets[name].value)
                    else:
                        binding.bind_output(name, self.device)
            session.run_with_iobinding(binding)
            if not fresh:
                continue
            for name, value in zip(self.gives[index], binding.get_outputs(), strict=True):
                if name in targets and value.data_ptr() != targets[name].value.data_ptr():
                    return False
                passed[name] = value
            if len(self.sessions) == 1:
                self._bindings[key] = binding
            # What no later segment takes is freed now; that is why the graph was cut.
            needed = {name for takes in self.takes[index + 1 :] for name in takes}
            passed = {name: value for name, value in passed.items() if name in needed}
        return True

    def run_copied(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs for arrays, in new memory.

        Raises:
            RunnerError: ONNX Runtime failed.
        """
        values = dict(feeds)
        for path, session, takes, gives in zip(self.paths, self.sessions, self.takes, self.gives, strict=True):
            try:
                results = session.run(gives, {name: values[name] for name in takes})
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise RunnerError(f"onnxruntime failed in {path.name}: {str(error)[:300]}") from error
            values.update(zip(gives, results, strict=True))
        return values


def _dtype_of(node: Any) -> str:
    inner = re.fullmatch(r"tensor\((\w+)\)", node.type)
    return _ORT_TYPES.get(inner[1], inner[1]) if inner else str(node.type)
