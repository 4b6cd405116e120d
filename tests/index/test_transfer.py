"""Pushing and pulling bundles: a folder, memory and a real S3 server, interrupted by SIGKILL and resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from core.errors import BundleAltered, BundleIncomplete, BundleMissing, TransferError
from index import transfer
from index.bundle import Bundle
from index.manifest import ENTITY_ENCODER_FOLDER, ENTITY_ENCODER_MANIFEST_FILE, EntityEncoder, FileEntry
from index.transfer import Remote, local_bundle, pull, push
from tests.conftest import write_small_bundle

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def s3_server():
    """Return the endpoint of a local S3 server with one bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_server, monkeypatch):
    """Set AWS's variables in the environment, for the local S3 server."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(s3_environment):
    """Return a URI in a new bucket."""
    bucket = f"bundles-{os.urandom(4).hex()}"
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.mkdir(bucket)
    return f"s3://{bucket}/releases/one"


@pytest.fixture
def place(request, tmp_path):
    """Return a URI of each kind."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
    elif request.param == "memory":
        request.getfixturevalue("monkeypatch").setattr(transfer, "_SCHEMES", ("file", "memory"))
        yield "memory://bundles/one"
        fsspec.filesystem("memory").rm("/bundles", recursive=True)
    else:
        yield f"file://{tmp_path}/store/one"


everywhere = pytest.mark.parametrize("place", ["file", "memory", "s3"], indirect=True)
durably = pytest.mark.parametrize("place", ["file", "s3"], indirect=True)


def content(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def files_of(bundle: Path) -> int:
    return len(content(bundle)) - 2  # two manifests


def other(uri: str):
    """Return the filesystem and root of a URI, independent of `Remote`."""
    return fsspec.core.url_to_fs(uri, skip_instance_cache=True)


def spoil(uri: str, name: str, change) -> None:
    filesystem, root = other(uri)
    path = f"{root}/{name}"
    filesystem.pipe_file(path, change(filesystem.cat_file(path)))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@everywhere
def test_a_pulled_bundle_equals_the_pushed_one(small_bundle, place, tmp_path, monkeypatch):
    monkeypatch.setattr("index.transfer.CHUNK_BYTES", 10_000)  # several requests a file
    sent = push(small_bundle, place, verify=True)
    assert (sent.files, sent.kept_files) == (files_of(small_bundle), 0)
    got = pull(place, tmp_path / "pulled")
    assert (got.files, got.bytes, got.bundle) == (sent.files, sent.bytes, sent.bundle)
    assert content(tmp_path / "pulled") == content(small_bundle)
    assert Bundle.open(tmp_path / "pulled", verify="full").unlisted_files() == []
    # A second pull transfers nothing.
    assert push(small_bundle, place).bytes == 0
    assert pull(place, tmp_path / "pulled").bytes == 0


# Kills its own process in the middle of the third file of a transfer.
KILLED = """
import os, shutil, signal
from pathlib import Path
from index import transfer
from index.transfer import Remote

transfer.FILES_AT_ONCE = 1
begun = []
put, chunks = Remote.put, Remote.chunks

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def put_half(self, name, source):
    begun.append(name)
    if len(begun) == 3:
        def copy_half(source, target):
            Path(target).write_bytes(Path(source).read_bytes()[: Path(source).stat().st_size // 2])
            die()
        shutil.copyfile = copy_half
        if not self._on_disk:
            self._filesystem.put_file = lambda *_: die()
    put(self, name, source)

def half(self, name, start, end):
    begun.append(name)
    data = b"".join(chunks(self, name, start, end))
    if len(begun) < 3:
        yield data
    else:
        yield data[: len(data) // 2]
        die()

Remote.put, Remote.chunks = put_half, half
"""


def killed(call: str) -> None:
    script = f"{KILLED}\n{call}\n"
    done = subprocess.run([sys.executable, "-c", script], timeout=TIMEOUT_S, check=False)
    assert done.returncode == -signal.SIGKILL


@durably
def test_a_killed_push_sends_only_what_is_missing(small_bundle, place, tmp_path):
    killed(f"transfer.push(Path({str(small_bundle)!r}), {place!r})")
    filesystem, root = other(place)
    assert not filesystem.exists(f"{root}/manifest.json")
    with pytest.raises(BundleIncomplete, match="push` again"):
        pull(place, tmp_path / "pulled")
    sent = push(small_bundle, place)
    assert (sent.kept_files, sent.files) == (2, files_of(small_bundle) - 2)
    pull(place, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(small_bundle)


@durably
def test_a_killed_pull_fetches_only_what_is_missing(small_bundle, place, tmp_path):
    push(small_bundle, place)
    folder = tmp_path / "pulled"
    killed(f"transfer.pull({place!r}, Path({str(folder)!r}))")
    with pytest.raises(BundleIncomplete):
        Bundle.open(folder)
    got = pull(place, folder)
    assert (got.kept_files, got.files) == (2, files_of(small_bundle) - 2)
    assert content(folder) == content(small_bundle)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_file_is_resumed(small_bundle, tmp_path, monkeypatch, damaged):
    store, folder = str(tmp_path / "store"), tmp_path / "pulled"
    push(small_bundle, store)
    killed(f"transfer.pull({store!r}, Path({str(folder)!r}))")
    name = "entities.sqlite"
    data = (small_bundle / name).read_bytes()
    (folder / name).unlink(missing_ok=True)
    left = data[: len(data) // 2]
    (folder / f".{name}.partial").write_bytes(flipped(left) if damaged else left)
    started: dict[str, list[int]] = {}
    chunks = Remote.chunks

    def noted(self, name, start, end):
        started.setdefault(name, []).append(start)
        return chunks(self, name, start, end)

    monkeypatch.setattr(Remote, "chunks", noted)
    pull(store, folder)
    assert started[name] == ([len(left), 0] if damaged else [len(left)])
    assert content(folder) == content(small_bundle)


@everywhere
def test_altered_files_at_the_uri_are_detected(small_bundle, place, tmp_path):
    push(small_bundle, place)
    spoil(place, "image_encoder.onnx", flipped)
    with pytest.raises(BundleAltered, match=r"image_encoder\.onnx is altered"):
        pull(place, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "manifest.json").exists()
    assert not (tmp_path / "pulled" / "image_encoder.onnx").exists()
    with pytest.raises(BundleAltered, match=r"image_encoder\.onnx is altered"):
        push(small_bundle, place, verify=True)


@everywhere
def test_missing_files_at_the_uri_are_reported(small_bundle, place, tmp_path):
    with pytest.raises(BundleMissing, match="check the URI"):
        pull(f"{place}/nowhere", tmp_path / "pulled")
    push(small_bundle, place)
    filesystem, root = other(place)
    filesystem.rm_file(f"{root}/entities.sqlite")
    with pytest.raises(TransferError, match=r"entities\.sqlite"):
        pull(place, tmp_path / "pulled")
    filesystem.rm_file(f"{root}/index/manifest.json")
    with pytest.raises(BundleIncomplete, match=r"index/manifest\.json is missing"):
        pull(place, tmp_path / "pulled")


@everywhere
def test_a_target_with_other_content_is_left_unchanged(small_bundle, place, tmp_path):
    write_small_bundle(tmp_path / "other", prefix="other:")
    push(small_bundle, place)
    with pytest.raises(TransferError, match="another bundle"):
        push(tmp_path / "other", place)
    pull(place, tmp_path / "pulled")
    with pytest.raises(TransferError, match="another bundle"):
        push_and_pull(tmp_path / "other", f"{place}-other", tmp_path / "pulled")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(TransferError, match="other files"):
        pull(place, tmp_path / "mine")
    assert content(tmp_path / "pulled") == content(small_bundle)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def push_and_pull(bundle: Path, uri: str, folder: Path) -> None:
    push(bundle, uri)
    pull(uri, folder)


@pytest.mark.parametrize("method", ["put", "chunks"])
def test_several_files_are_transferred_at_a_time(small_bundle, tmp_path, monkeypatch, method):
    together, begun = threading.Barrier(6), itertools.count()
    transfer_one = getattr(Remote, method)

    def wait_for_others(self, *arguments):
        if next(begun) < together.parties:
            together.wait(TIMEOUT_S)
        return transfer_one(self, *arguments)

    monkeypatch.setattr(Remote, method, wait_for_others)
    push_and_pull(small_bundle, str(tmp_path / "store"), tmp_path / "pulled")
    assert not together.broken
    assert content(tmp_path / "pulled") == content(small_bundle)


def test_no_transfer_is_running_after_an_error(small_bundle, tmp_path, monkeypatch):
    failed, begun, ended = threading.Event(), [], []

    def put(self, name, source):
        begun.append(name)
        if name == "entities.sqlite":
            failed.set()
            raise TransferError(f"{name} cannot be used")
        failed.wait(TIMEOUT_S)
        threading.Event().wait(0.05)  # still under way when the error is raised
        ended.append(name)

    monkeypatch.setattr(Remote, "put", put)
    with pytest.raises(TransferError, match=r"entities\.sqlite"):
        push(small_bundle, str(tmp_path / "store"))
    assert sorted(begun) == sorted([*ended, "entities.sqlite"])


# Pushes to a store that never answers, and reports when it is asked.
STUCK = """
import sys, threading
from wikiclip.cli import run
from index import cli
from index.transfer import Remote

def put(self, name, source):
    print("begun\\n", end="", flush=True)  # in one piece: several threads are here
    threading.Event().wait()

Remote.put = put
run(cli.bundle, sys.argv[1:])
"""


def test_ctrl_c_ends_a_transfer_at_once(small_bundle, tmp_path):
    command = [sys.executable, "-c", STUCK, "push", str(small_bundle), str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        # Python can miss a signal that arrives just before its main thread waits for a lock. A user presses again.
        log = None
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                _, log = process.communicate(timeout=TIMEOUT_S / 4)
                break
    assert log is not None
    assert process.returncode == 130
    assert log.splitlines()[-1] == "interrupted"
    assert "Traceback" not in log


def test_an_incomplete_bundle_is_not_pushed(small_bundle, tmp_path):
    shutil.copytree(small_bundle, tmp_path / "altered")
    path = tmp_path / "altered" / "entities.sqlite"
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(BundleAltered):
        push(tmp_path / "altered", f"file://{tmp_path}/store")
    assert not (tmp_path / "store").exists()


def test_an_altered_file_of_a_pulled_bundle_is_fetched_again(small_bundle, tmp_path):
    push(small_bundle, str(tmp_path / "store"))
    pull(str(tmp_path / "store"), tmp_path / "pulled")
    path = tmp_path / "pulled" / "entities.sqlite"
    path.write_bytes(flipped(path.read_bytes()))
    assert pull(str(tmp_path / "store"), tmp_path / "pulled").files == 1
    assert content(tmp_path / "pulled") == content(small_bundle)


def test_the_entity_encoder_is_transferred_too_and_can_be_added_later(small_bundle, tmp_path):
    bundle, store, folder = tmp_path / "bundle", str(tmp_path / "store"), tmp_path / "pulled"
    shutil.copytree(small_bundle, bundle)
    push(bundle, store)
    pull(store, folder)
    (bundle / ENTITY_ENCODER_FOLDER).mkdir()
    (bundle / ENTITY_ENCODER_FOLDER / "adaptor.onnx").write_bytes(b"adaptor")
    EntityEncoder(
        format_version=1,
        checkpoint_sha256=None,
        text_encoder="none",
        patches=1,
        patch_dim=1,
        text_dim=1,
        max_characters=1,
        parity={},
        files={"adaptor.onnx": FileEntry.of(bundle / ENTITY_ENCODER_FOLDER / "adaptor.onnx")},
    ).write(bundle / ENTITY_ENCODER_MANIFEST_FILE)
    assert push(bundle, store).files == 1
    assert pull(store, folder).files == 1
    assert content(folder) == content(bundle)


def test_a_manifest_cannot_name_a_file_outside(small_bundle, tmp_path):
    push(small_bundle, str(tmp_path / "store"))
    manifest = json.loads((small_bundle / "manifest.json").read_bytes())
    manifest["files"]["../outside"] = manifest["files"].pop("entities.sqlite")
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "outside").write_bytes((small_bundle / "entities.sqlite").read_bytes())
    with pytest.raises(BundleAltered, match="outside the bundle"):
        pull(str(tmp_path / "store"), tmp_path / "deep" / "pulled")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nothing://of/the/kind", "give a folder, file://... or s3://... (which needs the extra s3)"),
        ("ftp://127.0.0.1:1/one", "is not a place for bundles"),
        ("http://127.0.0.1:1/one", "is not a place for bundles"),
        ("file:///one::http://127.0.0.1:1/", "is not a place for bundles"),
        ("s3://bucket-that-is-not-there/one", "bucket"),
        ("s3://", "cannot be used"),
    ],
)
def test_an_unusable_uri_gives_a_one_line_error(s3_environment, small_bundle, uri, said):
    with pytest.raises(TransferError) as refused:
        push(small_bundle, uri)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@durably
def test_a_bundle_given_by_uri_is_pulled_once(small_bundle, place, tmp_path, monkeypatch):
    push(small_bundle, place)
    folder = local_bundle(place, tmp_path / "cache")
    assert Bundle.open(folder).fingerprint == folder.name
    assert local_bundle(place, tmp_path / "cache") == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert local_bundle(place, None).parent == tmp_path / "home" / "wikiclip" / "bundles"
    assert local_bundle(str(small_bundle), tmp_path / "cache") == small_bundle


def test_services_that_share_a_cache_pull_once(small_bundle, tmp_path):
    store, cache = f"file://{tmp_path}/store", tmp_path / "cache"
    push(small_bundle, store)
    call = f"local_bundle({store!r}, Path({str(cache)!r}))"
    script = f"from pathlib import Path; from index.transfer import local_bundle; {call}"
    started = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(TIMEOUT_S) for process in started] == [0] * 3
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert content(folder) == content(small_bundle)


def test_a_cache_that_cannot_be_written_names_the_setting(small_bundle, tmp_path):
    push(small_bundle, str(tmp_path / "store"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TransferError, match="WIKICLIP_BUNDLE_CACHE"):
        local_bundle(f"file://{tmp_path}/store", tmp_path / "file")
