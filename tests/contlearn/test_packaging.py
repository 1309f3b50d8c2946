"""What is packaged, what importing it costs, and what must not stand in any file."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration, read_configuration

ROOT = Path(__file__).parents[2]
LINKED = ("edge", "scenarios", "strategies")
GENERATED = {".hypothesis", ".venv", "__pycache__", "build", "dist", "runs", "site"}
# Written in two parts, so that this file does not hold what it looks for.
MACHINE_PATHS = ["/" + "work/", "/" + "opt/cl", "/" + "root/"]
PICKLING = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "joblib.dump",
    "joblib.load",
    "torch.save",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}


def project() -> dict[str, Any]:
    return read_configuration(ROOT / "pyproject.toml", expand=False)["project"]


def files(folder: Path) -> list[Path]:
    """Paths relative to ``folder``, links followed; without hidden and compiled files."""
    found = [Path(base, name) for base, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(path.relative_to(folder) for path in found if path.name[0] != "." and path.suffix != ".pyc")


def python_files(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.suffix == ".py"]


def repository_files() -> Iterator[Path]:
    """Files that git tracks or would track; in a tree without git, all but what tools generate."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        selection = ["--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command + selection, cwd=ROOT, capture_output=True, check=True).stdout
        yield from (ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name)
        return
    for base, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in GENERATED and not name.endswith(("_cache", ".egg-info"))]
        yield from (Path(base, name) for name in names)


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_version_is_the_same_everywhere() -> None:
    version = project()["version"]
    assert import_module("contlearn").__version__ == version
    assert {found.version for found in metadata.distributions(name="contlearn")} <= {version}


def test_command_leads_to_a_function() -> None:
    module, _, name = project()["scripts"]["contlearn"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_licence_is_the_full_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert project()["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- contents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKED)
def test_linked_package(name: str) -> None:
    link = ROOT / "contlearn" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (link / "__init__.py").is_file()


def test_only_contlearn_is_packaged() -> None:
    distribution = Distribution({"src_root": str(ROOT)})
    apply_configuration(distribution, ROOT / "pyproject.toml")
    packages = distribution.packages
    assert all(name.split(".")[0] == "contlearn" for name in packages)
    folders = {path.parent for path in python_files(ROOT / "contlearn")}
    assert set(packages) == {".".join(("contlearn", *folder.parts)) for folder in folders}, "a folder lacks __init__.py"


def test_wheel_by_way_of_the_sdist_holds_every_file_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("contlearn", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source / name)
    with tarfile.open(build("sdist", source, tmp_path)) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        assert not set(LINKED) & {part for member in archive for part in member.name.split("/")[1:2]}
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as archive:
        packed = sorted(Path(name) for name in archive.namelist() if ".dist-info/" not in name)
    assert packed == [Path("contlearn", path) for path in files(ROOT / "contlearn")], "see package-data"


def build(kind: str, source: Path, target: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(target / kind)]
    (target / kind).mkdir()
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = (target / kind).iterdir()
    return built


def test_importing_contlearn_imports_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "avalanche", "timm", "numpy", "onnx", "onnxruntime", "coremltools", "jsonargparse"}
    code = f"import sys, contlearn; sys.exit(' '.join({heavy!r} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# --- what must not stand in a file ------------------------------------------------------------------------------------


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    needles = [text.encode() for text in MACHINE_PATHS]
    kept = [path for path in repository_files() if path.is_file()]
    assert ROOT / "pyproject.toml" in kept
    holding = [str(path.relative_to(ROOT)) for path in kept if any(needle in path.read_bytes() for needle in needles)]
    assert holding == []


def test_no_code_is_run_or_unpickled_from_data() -> None:
    findings = [
        f"{folder}/{path}:{finding}"
        for folder in ("contlearn", "benchmarks")
        for path in python_files(ROOT / folder)
        for finding in unsafe((ROOT / folder / path).read_text())
    ]
    assert findings == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", ["1: imports pickle"]),
        ("from dill import loads", ["1: imports dill"]),
        ("x = 1\ny = eval('x')", ["2: calls eval"]),
        ("exec(text)", ["1: calls exec"]),
        ("yaml.load(text, Loader=yaml.Loader)", ["1: calls yaml.load"]),
        ("torch.save(model, path)", ["1: calls torch.save"]),
        ("torch.load(path)", ["1: calls torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=False)", ["1: calls torch.load without weights_only=True"]),
        ("np.load(path, allow_pickle=True)", ["1: passes allow_pickle=True"]),
        ("model.eval(); yaml.safe_load(text); torch.load(path, weights_only=True); np.load(path)", []),
    ],
)
def test_unsafe_code_is_recognised(code: str, found: list[str]) -> None:
    assert list(unsafe(code)) == found


def unsafe(code: str) -> Iterator[str]:
    """Places where code would be run from data, as ``line: what``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLING)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {item.arg: ast.unparse(item.value) for item in node.keywords}
            if called in UNSAFE_CALLS:
                yield f"{node.lineno}: calls {called}"
            if called == "torch.load" and options.get("weights_only") != "True":
                yield f"{node.lineno}: calls torch.load without weights_only=True"
            if options.get("allow_pickle") == "True":
                yield f"{node.lineno}: passes allow_pickle=True"
