"""Decoding within a budget: what is reserved, what is stopped, and that ordinary images are never delayed."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks.extreme import cases, chunk, encoded, gif, jpeg, jpeg_with, overlapping_tags, png, webp
from core.errors import TooLarge, TooManyRequests, Unavailable, UndecodableImage
from core.runtime import usable_memory
from imaging import Decoder, Preprocessing, load_pixels, readable_types
from imaging.header import read_header
from imaging.process import _MAIN, DecoderProcess
from tests.conftest import PREPROCESSING

TIMEOUT_S = 60  # long enough for a busy machine
MAX_PIXELS = 64_000_000
SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
ORDINARY = encoded(SMALL, "JPEG")
OTHER = encoded(SMALL, "GIF")  # decoded in a process
SLOW = jpeg(1448, scans=100_000)  # a minute and more


def decoder(**changes) -> Decoder:
    settings = {"max_pixels": MAX_PIXELS, "budget_bytes": 2**29, "timeout_s": TIMEOUT_S, "processes": 1}
    return Decoder(**{**settings, **changes})


def closing_decoder(**changes) -> closing[Decoder]:
    return closing(decoder(**changes))


def all_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "imaging.process" in " ".join(child.cmdline())]


@pytest.fixture(autouse=True)
def earlier(monkeypatch) -> None:
    """Remember the processes of decoders that earlier tests left open."""
    monkeypatch.setattr(sys.modules[__name__], "EARLIER", all_processes())


EARLIER: list[psutil.Process] = []


def processes() -> list[psutil.Process]:
    return [process for process in all_processes() if process not in EARLIER]


def until(condition) -> None:
    over_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < over_at
        time.sleep(0.005)  # another process is working: polling is the only way to see it


def decoding() -> psutil.Process:
    """Return the one decoder process, once it is at work in a library."""
    until(lambda: any(child.cpu_times().user > 0.5 for child in processes()))
    return processes()[0]


EXTREME = {case.name: case.bodies[0] for case in cases(0.01)}


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (EXTREME["tiff_fax"], UndecodableImage, r"fax coding \(CCITT RLE\)"),
        (EXTREME["tiff_tile"], TooLarge, "a tile has 2600 x 2600 pixels"),
        (webp(5000), TooLarge, r"image/webp of 5000 x 5000 pixels takes \d+ MiB; the limit is 300 MiB"),
    ],
    ids=["fax", "tile", "canvas"],
)
def test_the_header_alone_refuses(data, error, words):
    with closing_decoder(
        budget_bytes=400 * 2**20, max_pixels=25_000_000 if data.startswith(b"RIFF") else 640_000
    ) as strict:
        with pytest.raises(error, match=words):
            strict.load_pixels(data, PREPROCESSING)
        assert processes() == []


def test_a_long_image_is_not_stretched_beyond_the_budget():
    squash = Preprocessing.from_dict({**PREPROCESSING.to_dict(), "resize": "squash", "crop": "none"})
    with closing_decoder(budget_bytes=2**28) as strict, pytest.raises(TooLarge, match="1 x 2000000 pixels"):
        strict.load_pixels(png(1, height=2_000_000), squash)


def test_ordinary_images_start_no_process():
    with closing_decoder() as each:
        for data in (ORDINARY, encoded(SMALL, "PNG"), encoded(SMALL, "WEBP"), encoded(SMALL, "JPEG", progressive=True)):
            assert np.array_equal(
                each.load_pixels(data, PREPROCESSING), load_pixels(data, PREPROCESSING, max_pixels=MAX_PIXELS)
            )
        assert processes() == []


@pytest.mark.parametrize(
    "data",
    [
        SLOW,
        jpeg(64, scans=1, arithmetic=True),
        jpeg_with(b"\xff\xe1\0\x09Exif\0\0x" * 2),
        jpeg_with(b"\xff\xe0\0\2" * 1001),
        EXTREME["jpeg_fill"],
        EXTREME["jpeg_tags"],
        EXTREME["png_chunks"],
        EXTREME["png_tags"],
        EXTREME["png_texts"],
        EXTREME["webp_frames"],
        png(8, chunk(b"tEXt", b"Raw profile type exif\0" + bytes(100))),
        OTHER,
    ],
)
def test_images_that_headers_do_not_describe_are_not_ordinary(data):
    assert not read_header(data, max_pixels=MAX_PIXELS).ordinary


def test_a_frame_without_components_is_damaged():
    data = b"\xff\xd8" + b"\xff\xc2\0\x08\x08\0\x10\0\x10\0" + b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    with closing_decoder() as each, pytest.raises(UndecodableImage, match="truncated or damaged"):
        each.load_pixels(data, PREPROCESSING)


def test_a_reduced_jpeg_takes_less_and_a_progressive_one_more():
    photo = Image.fromarray(np.zeros((2000, 3000, 3), np.uint8))

    def memory(data: bytes, target_px: int | None) -> int:
        return read_header(data, max_pixels=MAX_PIXELS, target_px=target_px).memory_bytes

    baseline, progressive = encoded(photo, "JPEG"), encoded(photo, "JPEG", progressive=True)
    assert memory(baseline, 224) < memory(progressive, 224) < memory(progressive, None)
    assert memory(baseline, None) - memory(baseline, 224) > 8 * 5_000_000


def test_an_image_that_takes_too_long_is_stopped_and_the_next_one_decodes():
    with closing_decoder(timeout_s=2.0) as each:
        with pytest.raises(UndecodableImage, match=r"longer than 0\.55 s"):
            each.load_pixels(SLOW, PREPROCESSING)
        assert processes() == []
        assert each.load_pixels(OTHER, PREPROCESSING).shape == (32, 32, 3)


def test_an_image_that_takes_more_than_its_header_says_is_refused():
    big = bytearray(encoded(Image.new("P", (5000, 5000)), "GIF"))
    big[6:10] = b"\x40\0\x40\0"  # a canvas of 64 x 64 pixels, which Pillow enlarges to its first frame
    with closing_decoder() as each:
        with pytest.raises(TooLarge, match=r"more than the \d+ MiB that the header suggests"):
            each.load_pixels(bytes(big), PREPROCESSING)
        assert each.load_pixels(OTHER, PREPROCESSING).shape == (32, 32, 3)


def test_a_process_that_the_kernel_kills_is_replaced():
    with closing_decoder() as each, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(each.load_pixels, SLOW, PREPROCESSING)
        decoding().send_signal(signal.SIGKILL)
        with pytest.raises(TooLarge, match="more than"):
            pending.result(TIMEOUT_S)
        assert each.load_pixels(OTHER, PREPROCESSING).shape == (32, 32, 3)


def test_a_process_that_crashes_is_replaced():
    with closing_decoder() as each, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(each.load_pixels, SLOW, PREPROCESSING)
        decoding().send_signal(signal.SIGSEGV)
        with pytest.raises(UndecodableImage, match="crashed its decoder"):
            pending.result(TIMEOUT_S)
        assert each.load_pixels(OTHER, PREPROCESSING).shape == (32, 32, 3)


def test_a_cancelled_image_stops_its_process():
    async def run(each: Decoder) -> None:
        running = asyncio.create_task(each.load_region(SLOW, PREPROCESSING))
        queued = asyncio.create_task(each.load_region(SLOW, PREPROCESSING))
        await asyncio.to_thread(decoding)
        queued.cancel()
        running.cancel()
        assert await asyncio.gather(running, queued, return_exceptions=True) != []
        pixels_HW3, _, stage = await each.load_region(OTHER, PREPROCESSING)
        assert pixels_HW3.shape == (32, 32, 3)
        assert stage[0] < stage[1]

    with closing_decoder() as each:
        started_at = time.monotonic()
        asyncio.run(run(each))
        assert time.monotonic() - started_at < TIMEOUT_S


def test_an_image_that_waits_too_long_is_refused_while_ordinary_ones_are_decoded():
    async def run(each: Decoder) -> None:
        slow = asyncio.create_task(asyncio.to_thread(each.load_pixels, SLOW, PREPROCESSING))
        await asyncio.to_thread(until, lambda: each._isolated.free_bytes < each._isolated.budget_bytes)
        waiting = asyncio.create_task(each.load_region(OTHER, PREPROCESSING, deadline_s=8.4))
        patient = asyncio.create_task(each.load_region(OTHER, PREPROCESSING))
        assert (await each.load_region(ORDINARY, PREPROCESSING, deadline_s=8.4))[0].shape == (32, 32, 3)
        assert not slow.done()
        with pytest.raises(UndecodableImage):
            await slow
        with pytest.raises(TooManyRequests, match=r"no decoder was free for this image in 0\.3 s") as refusal:
            await waiting
        assert refusal.value.retry_after_s == 6
        assert (await patient)[0].shape == (32, 32, 3)

    with closing_decoder(timeout_s=6.0) as each:
        asyncio.run(run(each))


def test_images_share_the_budget_first_come_first_served(monkeypatch):
    sides, gate, running = [], threading.Event(), threading.Semaphore(0)

    def gated(data, **arguments):
        sides.append(Image.open(io.BytesIO(data)).width)
        running.release()
        assert gate.wait(TIMEOUT_S)
        return load_pixels(data, **arguments)

    monkeypatch.setattr("imaging.decoder.load_pixels", gated)
    images = [encoded(Image.new("RGB", (side, side)), "PNG") for side in (1501, 1502, 8)]
    with closing_decoder(budget_bytes=4 * 50 * 2**20, threads=3) as each, ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(each.load_pixels, images[0], PREPROCESSING)]
        until(lambda: sides == [1501])
        pending.append(pool.submit(each.load_pixels, images[1], PREPROCESSING))
        until(each._ordinary._turn.locked)
        pending.append(pool.submit(each.load_pixels, images[2], PREPROCESSING))
        until(lambda: len(each._ordinary._executor._threads) == 3)
        assert sides == [1501]  # the second does not fit at the same time, and the third does not overtake the second
        gate.set()
        assert [each.result(TIMEOUT_S).shape for each in pending] == [(32, 32, 3)] * 3
        assert sides[1:] == [1502, 8]
        until(lambda: each._ordinary.free_bytes == each._ordinary.budget_bytes)


def test_an_idle_process_ends_and_gets_no_task_while_it_may(monkeypatch):
    monkeypatch.setattr("imaging.process._FRESH_S", 0)
    with closing_decoder() as each:
        each.check(OTHER)
        (first,) = processes()
        each.check(OTHER)
        assert not first.is_running()
    monkeypatch.setattr("imaging.process._MAIN", f"import imaging.process as p; p._IDLE_S = 0.1; {_MAIN}")
    with closing_decoder() as each:
        each.check(OTHER)
        (child,) = processes()
        until(lambda: not psutil.pid_exists(child.pid))
        each.check(OTHER)


def test_a_closed_decoder_leaves_no_process_and_refuses():
    each = decoder()
    each.load_pixels(OTHER, PREPROCESSING)
    assert len(processes()) == 1
    each.close()
    assert processes() == []
    with pytest.raises(Unavailable, match="stopping"):
        each.check(OTHER)


PARENT = """
import sys, threading, time
from imaging import Decoder, Preprocessing, load_pixels, readable_types
decoder = Decoder(max_pixels=10**8, budget_bytes=2**29, timeout_s=16.0, processes=1)
thread = threading.Thread(target=decoder.check, args=(sys.stdin.buffer.read(),), daemon=True)
thread.start()
if sys.argv[1] == "idle":
    thread.join()
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("state", "data"), [("idle", OTHER), ("busy", SLOW)])
def test_a_process_ends_with_its_parent_whatever_ends_that(state, data):
    environment = {**os.environ, "WIKICLIP_ADMIN_TOKEN": "secret"}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(data)
        parent.stdin.close()
        children = psutil.Process(parent.pid).children
        parent.stdout.readline()
        until(lambda: state == "idle" or any(child.cpu_times().user > 0.3 for child in children()))
        (child,) = children()
        assert not any(name.startswith("WIKICLIP_") for name in child.environ())
        loaded = {os.path.basename(each.path) for each in child.memory_maps()}
        assert not any(name.startswith(("libtorch", "onnxruntime", "_swigfaiss")) for name in loaded)
        parent.kill()
    until(lambda: not child.is_running())


MODES = {
    "PNG": ("P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "BMP": ("L", "RGB"),
    "TIFF": ("P", "RGBA", "LAB", "F"),
    "JPEG": ("RGB", "CMYK"),
    "AVIF": ("RGB", "RGBA"),
    "HEIF": ("RGB", "RGBA"),
}


@pytest.mark.parametrize("form", MODES)
def test_every_mode_decodes_within_its_estimate(form):
    if {"AVIF": "image/avif", "HEIF": "image/heic"}.get(form, "image/png") not in readable_types():
        pytest.skip(f"this Pillow has no {form}")
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in MODES[form]:
        grey = mode in ("I;16", "F")
        image = Image.new("L" if grey else "RGB", (1200, 900), "teal")
        image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        options = {} if form in ("GIF", "BMP") else {"exif": exif.tobytes()}
        data = encoded(image, form, **options)
        header = read_header(data, max_pixels=MAX_PIXELS)
        assert (header.width, header.height) == (1200, 900)
        process = DecoderProcess()  # a new one each time, which has no free memory left from before
        arguments = {"preprocessing": PREPROCESSING, "max_pixels": MAX_PIXELS}
        limit = header.memory_bytes + 2 * len(data)
        process.run(load_pixels, data, arguments, memory_bytes=limit, timeout_s=TIMEOUT_S)
        process.close()


def test_a_gif_is_decoded_whatever_follows_its_first_frame():
    with closing_decoder() as each:
        assert each.load_pixels(gif(64, frames=1000), PREPROCESSING).shape == (32, 32, 3)


def test_overlapping_values_of_tags_are_counted():
    assert read_header(jpeg_with(b""), max_pixels=MAX_PIXELS).ordinary
    few = overlapping_tags(24)
    assert read_header(png(8, chunk(b"eXIf", few)), max_pixels=MAX_PIXELS).ordinary


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": "1000\n"}, 1000),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "2000\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 2000),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "2000\n", "sys/fs/cgroup/a/b/memory.max": "3000\n"}, 2000),
        ("3:cpu:/x\n2:memory:/docker/1\n", {"sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "4000\n"}, 4000),
        ("2:cpu,memory:/docker/1\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n"}, 5000),
        ("2:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_memory_of_a_cgroup(tmp_path, groups, files, limit):
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_memory(tmp_path) == (limit or psutil.virtual_memory().total)
    assert usable_memory(tmp_path / "nothing") == psutil.virtual_memory().total
