"""The doctor's verdicts on installations and machines that it is told about, and its manners."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools.config.pyprojecttoml import read_configuration

from contlearn import doctor
from contlearn.doctor import Check

ROOT = Path(__file__).parents[2]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed versions as the doctor sees them; a name that is taken out is not installed."""
    known = {**doctor.REQUIRED, **doctor.REQUIRED_BY_EXTRAS, "contlearn": "0.1.0"}
    for packages in doctor.OPTIONAL.values():
        known.update(packages)

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: [])
    return known


def named(name: str) -> Check:
    (check,) = [check for check in doctor.checks() if check.name == name]
    return check


def torch_pair(versions: dict[str, str], torch: str, torchvision: str) -> bool | None:
    versions.update(torch=torch, torchvision=torchvision)
    return named("torch with torchvision").ok


def bounds(requirements: list[str]) -> dict[str, str]:
    parsed = [Requirement(text) for text in requirements]
    return {item.name: str(item.specifier).removeprefix(">=") for item in parsed}


def test_table_of_requirements_is_that_of_pyproject() -> None:
    project = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
    assert bounds(project["dependencies"]) == doctor.REQUIRED
    for extra, packages in doctor.OPTIONAL.items():
        assert bounds(project["optional-dependencies"][extra]) == packages
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.MINIMUM_PYTHON))


def test_complete_installation_exits_0(versions: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert "0 required and missing" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name", [*doctor.REQUIRED, *doctor.REQUIRED_BY_EXTRAS])
def test_missing_requirement_shows_the_pip_command(
    versions: dict[str, str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    minimum = versions.pop(name)
    assert doctor.main([]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")]
    assert line.split()[1] == name
    assert line.endswith(f'-> python -m pip install "{name}>={minimum}"')


def test_missing_extra_is_no_failure(versions: dict[str, str]) -> None:
    del versions["ray"], versions["mlxtend"]
    for name, package in (("ray (extra ray)", "ray"), ("mlxtend (extra demo)", "mlxtend")):
        assert named(name).ok is None
        assert f'pip install "{package}>=' in named(name).fix
    assert doctor.main([]) == 0


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [
        ("2.8.1", "2.9", True),
        ("2.9", "2.9.0", False),
        ("2.9.0", "2.9", False),
        ("2.10.0", "2.9", False),
        ("2.15.0+cpu", "2.15", False),
        ("2.8.0a0+build.7", "2.9", True),
        ("10.0", "9.0", False),
    ],
)
def test_old_version_is_reported_as_missing(versions: dict[str, str], version: str, minimum: str, older: bool) -> None:
    versions["torch"] = version
    check = doctor._package("torch", minimum, missing=False)
    assert check.ok is not older
    assert version in check.detail
    assert (f'"torch>={minimum}"' in check.fix) == older


@pytest.mark.parametrize(
    ("platform", "torch", "torchvision", "ok"),
    [
        ("linux", "2.15.0", "0.29.2", True),
        ("linux", "2.15.0+cpu", "0.29.2+cpu", True),
        ("linux", "2.15.0+cu130", "0.29.2+cu130", True),
        ("linux", "2.15.0", "0.29.2+cu130", True),
        ("linux", "2.15.0+cpu", "0.29.2", False),
        ("linux", "2.15.0", "0.29.2+cpu", False),
        ("linux", "2.15.0+cpu", "0.29.2+cu130", False),
        ("linux", "2.15.0+cu126", "0.29.2+cu130", False),
        ("linux", "2.15.0+rocm6.4", "0.29.2", False),
        ("linux", "2.9.0a0+vendor.25", "0.24.0+1f2e3d", True),
        ("darwin", "2.15.0", "0.29.2", True),
        ("win32", "2.15.0+cpu", "0.29.2", True),
    ],
)
def test_torch_and_torchvision_for_different_devices(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, platform: str, torch: str, torchvision: str, ok: bool
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert torch_pair(versions, torch, torchvision) is ok


@pytest.mark.parametrize(
    ("wanted", "ok"),
    [("torch==2.14.0", False), ("torch (==2.15.0)", True), ("torch (>=2.14.0)", True), ("torch>=2.16", False)],
)
def test_torchvision_that_wants_another_torch(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, wanted: str, ok: bool
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", wanted])
    assert torch_pair(versions, "2.15.0", "0.29.2") is ok


def test_cpu_build_beside_a_gpu(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "CUDA: some card")
    assert named("device").ok is True
    versions.update(torch="2.15.0+cpu", torchvision="0.29.2+cpu")
    check = named("device")
    assert check.ok is None
    assert "built for the CPU" in check.detail


@pytest.mark.parametrize(("value", "ok"), [("1", True), ("100000", None), ("many", None), ("0", None), ("", None)])
def test_thread_variable(monkeypatch: pytest.MonkeyPatch, value: str, ok: bool | None) -> None:
    for variable in doctor.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    check = named("threads")
    assert check.ok is ok
    assert f"OMP_NUM_THREADS={value}" in check.detail


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMORY_WANTED", 2**60)
    monkeypatch.setattr(doctor, "DISK_WANTED", 2**60)
    assert named("memory").ok is None
    assert named("disk (here)").ok is None


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTLEARN_DATA", str(tmp_path))
    assert named("data folder").ok is True
    assert str(tmp_path) in named("disk (data)").detail
    absent = tmp_path / "not here"
    monkeypatch.setenv("CONTLEARN_DATA", str(absent))
    check = named("data folder")
    assert check.ok is None
    assert f"mkdir -p '{absent}'" in check.fix


def test_data_sets_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTLEARN_DATA", str(tmp_path))
    assert named("data set digits").ok is True
    absent = named("data set cifar10")
    assert absent.ok is None
    assert str(tmp_path) in absent.fix


def test_checkout_without_symbolic_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = named("contlearn")
    assert check.ok is False
    assert "core.symlinks" in check.fix


def test_broken_check_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Path:
        raise OSError("no such device")

    monkeypatch.setattr(Path, "cwd", broken)
    check = named("disk")
    assert check.ok is None
    assert "no such device" in check.detail
    assert named("python").ok is True


def test_everything_that_is_not_ok_has_a_fix(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions.clear()
    monkeypatch.setattr(doctor, "MEMORY_WANTED", 2**60)
    monkeypatch.setattr(doctor, "DISK_WANTED", 2**60)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setenv("CONTLEARN_DATA", str(tmp_path / "absent"))
    found = doctor.checks()
    assert all(check.fix for check in found if check.ok is not True)
    assert all("\n" not in check.name + check.detail + check.fix for check in found)
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) + 1
    assert all("->" in line for line in lines[:-1] if not line.startswith("ok"))


def test_report_without_rich(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del versions["rich"]
    doctor.main([])
    with_rich = capsys.readouterr().out
    for module in ("rich", "rich.console", "rich.text"):
        monkeypatch.setitem(sys.modules, module, None)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out == with_rich


def test_heavy_libraries_are_not_imported() -> None:
    code = (
        "import sys, contlearn.doctor as doctor; doctor.main([]);"
        "heavy = {'torch', 'torchvision', 'avalanche', 'timm', 'numpy', 'onnx', 'coremltools', 'sklearn', 'pandas'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert "processor" in result.stdout
    assert "\x1b" not in result.stdout
