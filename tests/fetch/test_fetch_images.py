"""`wikiclip fetch-images` against a misbehaving server."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.images import ImageReader, TarShards, UnusableImage, shard_path
from core.errors import CatalogError, UserError
from fetch.download import FetchLimits
from fetch.run import FetchConfig, fetch_images, user_agent
from imaging import decode

Server = Any  # the class is in conftest.py, which cannot be imported
CatalogOf = Callable[[Sequence[str]], Path]

CONTACT = "someone@example.org"


@pytest.fixture
def config(tmp_path: Path) -> FetchConfig:
    return FetchConfig(
        catalog=tmp_path / "catalog.jsonl",
        out=tmp_path / "images",
        contact=CONTACT,
        limits=FetchLimits(
            connections=16,
            requests_per_s=1e6,
            bits_per_s=1e12,
            max_bytes=100_000,
            timeout_s=10,
            retries=2,
            backoff_s=0.01,
        ),
        allow_private=True,
    )


def reasons(out: Path) -> dict[str, str]:
    """Return the reason of each failure by entity id."""
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {row["record"]: row["reason"].split(": ", 1)[1] for row in rows}


def test_images_are_stored_as_webdataset_shards(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    names = [f"good/{number}" for number in range(20)]
    catalog_of([*names, "good/3"])
    report = fetch_images(replace(config, shard_bytes=3000))
    assert (report.fetched, report.failed, report.known, report.rejects) == (20, 0, 1, "")
    assert all(count == 1 for count in server.requests.values())
    images = ImageReader(config.out)
    seen: dict[str, bytes] = {}
    shards = sorted(config.out.glob("*.tar"))
    assert len(shards) > 2
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".jpg"):
                facts = json.loads(members[name.replace(".jpg", ".json")])
                seen[facts["url"]] = data
                assert facts["media_type"] == "image/jpeg"
    assert set(seen) == {server.url(name) for name in names}
    for url, data in seen.items():
        assert images.read(url) == data
        decode(data, max_pixels=1000)
    (agent,) = server.agents
    assert agent.startswith("wikiclip-serve/")
    assert f"({CONTACT})" in agent


def test_transient_failures_are_retried_and_permanent_ones_reported(
    config: FetchConfig, server: Server, catalog_of: CatalogOf
) -> None:
    transient = ["flaky/1", "cut/1", "reset/1", "moved/1", "good/1", "wiki/Special:FilePath/A.jpg?width=500"]
    permanent = ["down/1", "gone/1", "loop/1", "away/1", "text/1", "half/1", "fax/1", "huge/1", "closed/1"]
    catalog_of([*transient, *permanent])
    report = fetch_images(config)
    assert (report.fetched, report.failed) == (len(transient), len(permanent))
    found = reasons(config.out)
    assert [found[f"Q{number}"] for number in range(len(transient), len(transient) + len(permanent))] == [
        "the server answered 500, 3 times",
        "the server answered 404",
        "redirects more than 5 times",
        "redirects to something that is not an http or https URL",
        "the bytes are not an image",
        "the image/jpeg data is truncated or damaged",
        "TIFF images in a fax coding (CCITT RLE) are not read",
        "is over 100000 bytes",
        "the server answered 503 and asks to wait 86400 s; try again later",
    ]
    assert server.requests["/flaky/1"] == server.requests["/down/1"] == 3
    assert server.requests["/wiki/Special:Redirect/file/A.jpg?width=500"] == 1
    assert server.requests["/gone/1"] == server.requests["/text/1"] == 1
    assert server.requests["/loop/1"] == 6
    with pytest.raises(UnusableImage, match="was not fetched: the server answered 404"):
        ImageReader(config.out).read(server.url("gone/1"))
    # A second run fetches nothing. Failures are retried on request.
    server.requests.clear()
    report = fetch_images(config)
    assert (report.fetched, report.failed, report.known) == (0, 0, 15)
    assert report.rejects
    assert not server.requests
    report = fetch_images(replace(config, retry_failed=True))
    assert (report.fetched, report.failed, report.known) == (0, len(permanent), len(transient))


def test_a_nonsensical_header_fails_one_image(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    strange = [f"strange/{number}" for number in range(6)]
    catalog_of([*strange, "good/1"])
    report = fetch_images(config)
    assert (report.fetched, report.failed) == (1, len(strange))
    assert list(reasons(config.out).values()) == [
        *["the server answered 503, 3 times"] * 2,
        "the server answered 503 and asks to wait inf s; try again later",
        *["redirects to something that is not an http or https URL"] * 2,
        "redirects to something that is not a URL",
    ]


def test_a_slow_response_times_out(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    catalog_of(["drip/1", "good/1"])
    limits = replace(config.limits, timeout_s=0.3, retries=1)
    report = fetch_images(replace(config, limits=limits))
    assert (report.fetched, report.failed) == (1, 1)
    assert reasons(config.out) == {"Q0": "took over 0.3 s, 2 times"}


def test_retry_after_pauses_the_host(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    catalog_of(["busy/1", *(f"good/{number}" for number in range(30))])
    report = fetch_images(replace(config, limits=replace(config.limits, connections=1)))
    assert (report.fetched, report.failed) == (31, 0)
    refused_at = next(at for path, at in server.times if path == "/busy/1")
    assert min(at for _, at in server.times if at > refused_at) - refused_at > 0.95


def test_connections_per_host_are_limited(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    catalog_of([f"slow/{number}" for number in range(12)])
    fetch_images(replace(config, limits=replace(config.limits, connections=3)))
    assert server.most_active == 3


@pytest.mark.parametrize("pace", [{"requests_per_s": 20.0}, {"bits_per_s": 8 * 20 * 700.0}])
def test_the_rate_per_host_is_limited(
    config: FetchConfig, server: Server, catalog_of: CatalogOf, pace: dict[str, float]
) -> None:
    """Ten more images take half a second at 20 requests per second, or at the bytes of 20 images per second."""
    catalog_of([f"good/{number}" for number in range(11)])
    fetch_images(replace(config, limits=replace(config.limits, **pace, connections=1)))
    times = [at for _, at in server.times]
    assert times[-1] - times[0] > 0.45


def test_private_addresses_are_refused(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    catalog_of(["good/1"])
    report = fetch_images(replace(config, allow_private=False))
    assert (report.fetched, report.failed) == (0, 1)
    assert "not on the public internet" in reasons(config.out)["Q0"]
    assert not server.requests


def test_a_killed_run_continues(config: FetchConfig, server: Server, catalog_of: CatalogOf) -> None:
    count = 60
    path = catalog_of([f"slow/{number}" for number in range(count)])
    command = [
        Path(sys.executable).with_name("wikiclip"), "fetch-images", "--catalog", path, "--out", config.out,
        "--contact", CONTACT, "--allow-private", "--rate", "1000", "--json",
    ]  # fmt: skip
    # A shard holds three images. The process is killed once there are a few shards.
    small_shards = [sys.executable, "-c", _SMALL_SHARDS, path, config.out, CONTACT]
    for shards in (2, 5):
        process = subprocess.Popen(small_shards, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while len(list(config.out.glob("[0-9]*.tar"))) < shards:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["known"] >= 12
    assert summary["fetched"] + summary["known"] == count
    images = ImageReader(config.out)
    for number in range(count):
        decode(images.read(server.url(f"slow/{number}")), max_pixels=1000)
    # Only images in progress when the process was killed are requested twice.
    assert sum(server.requests.values()) < count + 30


_SMALL_SHARDS = """
import sys
from pathlib import Path
from fetch.run import FetchConfig, fetch_images
catalog, out, contact = sys.argv[1:]
fetch_images(FetchConfig(catalog=Path(catalog), out=Path(out), contact=contact, shard_bytes=2000, allow_private=True))
"""


def test_a_shard_that_is_not_in_the_index_is_overwritten(tmp_path: Path) -> None:
    with TarShards(tmp_path, shard_bytes=10) as shards:
        shards.add("http://a/1", b"0123456789", "image/png", {})
    shard_path(tmp_path, 1).write_bytes(b"killed between the renaming and the listing")
    with TarShards(tmp_path, shard_bytes=10) as shards:
        assert shards.knows("http://a/1")
        shards.add("http://a/2", b"abc", "image/png", {})
    assert ImageReader(tmp_path).read("http://a/1") == b"0123456789"
    assert ImageReader(tmp_path).read("http://a/2") == b"abc"
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(CatalogError, match=r"00001\.tar cannot be read"):
        ImageReader(tmp_path).read("http://a/2")
    shard_path(tmp_path, 0).write_bytes(b"")
    with pytest.raises(CatalogError, match="cut short"):
        ImageReader(tmp_path).read("http://a/1")
    with pytest.raises(UnusableImage, match="run fetch-images"):
        ImageReader(tmp_path).read("http://a/3")


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with TarShards(tmp_path, shard_bytes=10), pytest.raises(UserError, match="another process"):
        TarShards(tmp_path, shard_bytes=10)


def test_a_full_disk_is_reported_and_finished_shards_stay(
    config: FetchConfig, server: Server, catalog_of: CatalogOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog_of([f"good/{number}" for number in range(10)])
    fetch_images(replace(config, catalog=catalog_of(["good/0"])))
    catalog_of([f"good/{number}" for number in range(10)])

    class FullDisk(io.BytesIO):
        def write(self, *_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    open_tar = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: open_tar(fileobj=FullDisk(), mode="w"))
    with pytest.raises(UserError, match="is full; free some space"):
        fetch_images(config)
    monkeypatch.undo()
    assert ImageReader(config.out).read(server.url("good/0"))
    assert fetch_images(config).fetched == 9


@pytest.mark.parametrize("contact", ["", "me", "a@b", "me @example.org", "a@b.org)\r\nX: y", "ftp://example.org"])
def test_an_invalid_contact_is_refused(contact: str) -> None:
    with pytest.raises(UserError, match="is not a contact"):
        user_agent(contact)
    assert "(https://example.org/bot)" in user_agent("https://example.org/bot")


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="fetch-images"):
        ImageReader(tmp_path)
