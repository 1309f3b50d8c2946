"""Downloads, served by this machine itself: what is unpacked where, and how a failure reads."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import describe, list_datasets, load

# Avalanche imports qpsolvers, which warns when it is imported without a solver.
pytestmark = pytest.mark.filterwarnings("ignore:no QP solver found")
DOWNLOADABLE = [name for name in list_datasets() if describe(name).downloadable]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of ``tmp_path/server`` on the loopback interface."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Quiet, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def archive(tmp_path: Path, server: str) -> Path:
    """A stand-in tiny-imagenet-200.zip with two classes."""
    path = tmp_path / "server" / "tiny-imagenet-200.zip"
    Image.new("RGB", (4, 4)).save(tmp_path / "image.JPEG")
    with zipfile.ZipFile(path, "w") as content:
        for wnid in ("n1", "n2"):
            content.write(tmp_path / "image.JPEG", f"tiny-imagenet-200/train/{wnid}/images/{wnid}_0.JPEG")
            content.write(tmp_path / "image.JPEG", f"tiny-imagenet-200/val/images/{wnid}.JPEG")
        content.writestr("tiny-imagenet-200/val/val_annotations.txt", "n1.JPEG\tn1\nn2.JPEG\tn2\n")
        content.writestr("tiny-imagenet-200/wnids.txt", "n1\nn2\n")
        content.writestr("tiny-imagenet-200/words.txt", "n1\tone\nn2\ttwo\n")
    return path


def serve(monkeypatch: pytest.MonkeyPatch, server: str, archive: Path, md5: str | None = None) -> None:
    source = "avalanche.benchmarks.datasets.TinyImagenet"
    monkeypatch.setattr(f"{source}.filename", (archive.name, f"{server}/{archive.name}"))
    monkeypatch.setattr(f"{source}.md5", md5 or hashlib.md5(archive.read_bytes()).hexdigest())


def test_the_downloadable_sets() -> None:
    assert DOWNLOADABLE == ["cifar10", "cifar100", "tiny_imagenet", "core50", "cub200"]


def test_a_missing_set_is_downloaded_once(
    tmp_path: Path, server: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, server, archive)
    root = tmp_path / "new" / "root"
    assert load("tiny_imagenet", root=root, image_size=4, download=True).class_names == ("one", "two")
    assert sorted(path.name for path in root.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]
    archive.unlink()
    assert load("tiny_imagenet", root=root, image_size=4, download=True).n_classes == 2


def test_an_archive_with_the_wrong_checksum_is_not_unpacked(
    tmp_path: Path, server: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, server, archive, md5="0" * 32)
    with pytest.raises(ContlearnError, match="corrupted"):
        load("tiny_imagenet", root=tmp_path / "root", download=True)
    assert not any(path.is_dir() for path in (tmp_path / "root").iterdir())


def test_an_incomplete_folder_is_not_overwritten(
    tmp_path: Path, server: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, server, archive)
    kept = tmp_path / "tiny-imagenet-200" / "wnids.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(ContlearnError, match=f"{kept.parent} is there but incomplete"):
        load("tiny_imagenet", root=tmp_path, download=True)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_a_failed_download_names_the_address_and_the_root(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = (tmp_path / "server" / "gone.zip").as_uri()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", gone)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", gone)
    monkeypatch.setattr("avalanche.benchmarks.datasets.TinyImagenet.filename", ("gone.zip", gone))
    monkeypatch.setattr("avalanche.benchmarks.datasets.CUB200.official_url", gone)
    monkeypatch.setattr("avalanche.benchmarks.datasets.core50.core50_data.data", [("gone.zip", gone, "0" * 32)])
    with pytest.raises(ContlearnError) as caught:
        load(name, root=tmp_path / "root", download=True)
    for part in (name, gone, str(tmp_path / "root"), "URLError"):
        assert part in str(caught.value)
