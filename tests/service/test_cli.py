"""`wikiclip serve` and `wikiclip recognize`, as the console script runs them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import wikiclip.cli

WIKICLIP = [sys.executable, "-m", "wikiclip"]
TIMEOUT_S = 300  # generous: a busy machine is no failure


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command line in this process, as the console script does."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["wikiclip", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            wikiclip.cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture
def folder(tmp_path, small_images) -> Path:
    """A folder of folders: three images, one broken, one file that is none."""
    images = tmp_path / "images"
    (images / "deep" / "er").mkdir(parents=True)
    (images / "a.png").write_bytes(small_images["Q140"])
    (images / "deep" / "b.PNG").write_bytes(small_images["Q503"])
    (images / "deep" / "er" / "c.png").write_bytes(small_images["flag:JP"])
    (images / "deep" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (images / "notes.txt").write_text("no image")
    return images


def check_folder(rows: list[dict], folder: Path) -> None:
    found = {
        str(Path(row["image"]).relative_to(folder)): row["predictions"][0]["entity_id"]
        for row in rows
        if "predictions" in row
    }
    assert found == {"a.png": "Q140", "deep/b.PNG": "Q503", "deep/er/c.png": "flag:JP"}
    (failed,) = [row for row in rows if "error" in row]
    assert Path(failed["image"]).name == "broken.jpg"
    assert failed["error"]["status"] == 422


def test_a_folder_with_a_bundle(run, folder, small_bundle):
    ended = run("recognize", folder, "--bundle", small_bundle, "--json", "--top-k", 2)
    assert ended.returncode == 0, ended.stderr
    check_folder([json.loads(line) for line in ended.stdout.splitlines()], folder)
    assert "broken.jpg" in ended.stderr
    assert "3 recognised, 1 failed" in ended.stderr


def test_a_folder_through_a_service_into_a_file(run, folder, service, tmp_path):
    out = tmp_path / "answers.jsonl"
    ended = run("recognize", folder, "--url", service.base_url, "--out", out)
    assert ended.returncode == 0, ended.stderr
    check_folder([json.loads(line) for line in out.read_text().splitlines()], folder)
    assert ended.stdout == ""


def test_on_the_terminal(run, folder, small_bundle):
    ended = run("recognize", folder / "a.png", "--bundle", small_bundle, "--top-k", 1, "--types", "animal,flag")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"1\s+1\.000\s+100 %  🦁 Lion  \[Q140\]", ended.stdout)


@pytest.mark.parametrize("command", ["missing file", "empty folder", "only bad", "neither", "both", "nobody there"])
def test_recognize_failures_exit_2_with_one_line(run, command, folder, small_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    ended = run(
        "recognize",
        *{
            "missing file": [tmp_path / "nothing.png", "--bundle", small_bundle],
            "empty folder": [tmp_path / "empty", "--bundle", small_bundle],
            "only bad": [folder / "deep" / "broken.jpg", "--bundle", small_bundle],
            "neither": [folder],
            "both": [folder, "--bundle", small_bundle, "--url", "http://localhost"],
            "nobody there": [folder / "notes.txt", "--url", "not a url"],
        }[command],
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.stderr


def test_serve_until_sigterm(small_bundle, small_images):
    process = subprocess.Popen(
        [*WIKICLIP, "serve", "--bundle", str(small_bundle), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        addresses = (re.search(r"http://\S+", json.loads(line)["message"]) for line in process.stderr)
        url = next(found for found in addresses if found is not None)
        with httpx.Client(base_url=url.group(), timeout=TIMEOUT_S, transport=httpx.HTTPTransport(retries=5)) as client:
            answer = client.post("/recognize?top_k=1", files={"image": small_images["Q140"]})
            assert answer.json()["predictions"][0]["entity_id"] == "Q140"
            request_id = answer.json()["request_id"]
            assert client.get("/livez").status_code == 200  # probes that succeed are not logged
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in rest.splitlines()]
    (access,) = [line for line in lines if line["logger"] == "wikiclip.access"]
    assert access["request_id"] == request_id
    assert (access["path"], access["status"]) == ("/recognize", 200)
    assert not [line for line in lines if line["level"] in ("warning", "error", "critical")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "--bundle"), (["--bundle", "x", "--max-batch", "many"], "max_batch"), (["--admin-key", "x"], "--admin-key")],
)
def test_serve_with_a_wrong_flag_exits_2_with_one_line(run, arguments, said):
    ended = run("serve", *arguments)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert said in ended.stderr


@pytest.mark.parametrize("fault", ["missing", "altered", "port taken"])
def test_serve_failures_exit_2_with_one_line(fault, small_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small_bundle, copy)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bundle, port, said = {
            "missing": (tmp_path / "nowhere", 0, "does not exist"),
            "altered": (copy, 0, "image_encoder.onnx"),
            "port taken": (copy, taken.getsockname()[1], "--port"),
        }[fault]
        if fault == "altered":
            with (copy / "image_encoder.onnx").open("r+b") as file:
                file.write(b"\0\0\0\0")
        command = [*WIKICLIP, "serve", "--bundle", str(bundle), "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert said in ended.stderr
