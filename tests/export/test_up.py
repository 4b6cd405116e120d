"""`wikiclip up`, as its user runs it: from a folder of pictures to answers, again after a stop, and its errors."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageEnhance

from index.bundle import Bundle
from tests.commands import run_wikiclip

VIEWS = 3
UP = ("up", "--image-encoder", "tiny")


def up(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_wikiclip(*UP, *arguments)


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, which is killed at the end."""
    command = [sys.executable, "-m", "wikiclip", *UP, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], start: str) -> list[str]:
    """The lines of output up to the one that begins so."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(start):
            return lines
    pytest.fail(f"the command ended without {start!r}:\n" + "\n".join(lines))


def interrupt(process: subprocess.Popen[str]) -> int:
    """Send Ctrl-C. The rest of the output is read, because a full pipe would stop the process."""
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    return process.returncode


@pytest.fixture
def pictures(tmp_path: Path, small_images: dict[str, bytes]) -> Path:
    return write_pictures(tmp_path, small_images)


def write_pictures(folder: Path, images: dict[str, bytes]) -> Path:
    """A folder for each entity with pictures of it in different light, and one broken picture."""
    for number, image in enumerate(images.values()):
        (folder / "pictures" / f"thing {number}").mkdir(parents=True)
        for view in range(VIEWS):
            changed = ImageEnhance.Brightness(Image.open(io.BytesIO(image))).enhance(1 + 0.1 * view)
            changed.save(folder / "pictures" / f"thing {number}" / f"{view}.png")
    (folder / "pictures" / "thing 0" / "broken.png").write_bytes(image[:60])
    return folder / "pictures"


@pytest.fixture
def onnx_encoder(small_bundle: Path, tmp_path: Path) -> str:
    """A small encoder. Unlike `tiny`, it needs no conversion, which takes most of the time of a run."""
    preprocessing = json.loads((small_bundle / "manifest.json").read_text())["preprocessing"]
    (tmp_path / "encoder.json").write_text(json.dumps(preprocessing))
    shutil.copy(small_bundle / "image_encoder.onnx", tmp_path / "encoder.onnx")
    return f"onnx:{tmp_path / 'encoder.onnx'}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_images: dict[str, bytes]) -> Path:
    """The bundle of a run without a stop."""
    pictures = write_pictures(tmp_path_factory.mktemp("made"), small_images)
    bundle = pictures.parent / "things"
    done = up(pictures, "--out", bundle, "--no-serve")
    assert done.returncode == 0, done.stderr
    assert f"{len(small_images)} entities, {VIEWS * len(small_images)} images" in done.stdout
    assert "1 not used: 1 x broken picture (thing 0/broken.png)" in done.stdout
    return bundle


def test_the_bundle_names_no_path_and_rejects_are_counted_once(made: Path) -> None:
    Bundle.open(made, verify="full")
    folder = str(made.parent).encode()
    assert [path for path in made.rglob("*") if path.is_file() and folder in path.read_bytes()] == []
    rejects = [json.loads(line) for line in (made.parent / "rejected.jsonl").read_text().splitlines()]
    assert [each["record"] for each in rejects] == ["thing 0/broken.png"]


def test_a_second_run_serves_what_the_first_one_made(made: Path, small_images: dict[str, bytes]) -> None:
    before = (made / "manifest.json").read_bytes()
    with running(made.parent / "pictures", "--out", made, "--port", "0") as process:
        lines = read_until(process, "page: ")
        address = lines[-1].split()[1]
        # The page is announced just before the service starts, so the transport retries with growing pauses.
        with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=9), timeout=60) as client:
            assert client.get("/readyz").status_code == 200
            image = made.parent / "pictures" / "thing 3" / "1.png"
            answer = client.post("/recognize", files={"image": image.read_bytes()}).json()
            assert answer["predictions"][0]["title"] == "thing 3"
            assert answer["predictions"][0]["description"] is None  # the title is the text
            assert client.get("/entities/thing-3/thumbnail").headers["content-type"] == "image/webp"
            assert "<html" in client.get("/").text
        assert interrupt(process) == 130
    assert (made / "manifest.json").read_bytes() == before


def test_an_interrupted_run_continues(pictures: Path, onnx_encoder: str) -> None:
    bundle = pictures.parent / "things"
    arguments = [pictures, "--out", bundle, "--image-encoder", onnx_encoder, "--no-serve"]
    with running(*arguments) as process:
        read_until(process, "catalog ")
        # A shell reports both as 130. Python ends by the signal if it came while `exec` ran, as imports of classes do.
        assert interrupt(process) in (130, -signal.SIGINT)
    assert not (bundle / "manifest.json").exists()
    done = up(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(Bundle.open(bundle, verify="full").embeddings()) == VIEWS * len(list(pictures.iterdir()))


def test_a_changed_folder_is_no_mixture(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made.parent, tmp_path / "copy")
    shutil.copy(folder / "pictures" / "thing 1" / "0.png", folder / "pictures" / "thing 2" / "0.png")
    done = up(folder / "pictures", "--out", folder / made.name, "--no-serve")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "was made from other pictures or texts" in done.stderr


def missing(pictures: Path) -> list[str | Path]:
    return [pictures / "none"]


def empty(pictures: Path) -> list[str | Path]:
    (pictures / "empty").mkdir()
    return [pictures / "empty"]


def all_bad(pictures: Path) -> list[str | Path]:
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"no picture")
    return [pictures]


def foreign_output(pictures: Path) -> list[str | Path]:
    return [pictures, "--out", pictures.parent]


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (missing, "is not a folder"),
        (empty, "is empty"),
        (all_bad, "no picture that can be used: 34 x not a picture"),
        (foreign_output, "is not empty"),
    ],
)
def test_an_error_is_one_line(
    pictures: Path, tmp_path: Path, prepare: Callable[[Path], list[str | Path]], reason: str
) -> None:
    done = up("--out", tmp_path / "bundle", *prepare(pictures), "--no-serve")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_used_port_is_noticed_first(pictures: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = up(pictures, "--out", tmp_path / "bundle", "--port", str(server.getsockname()[1]))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Address already in use" in done.stderr
    assert not (tmp_path / "rejected.jsonl").exists()
