"""`wikiclip bench peers`: LitServe, mosec and BentoML serving the bundle's ONNX file, and this service beside them.

All get the same photographs (1280x960), the same vectors, and the same threads. The load generator has one core and the
server the others, where there is more than one. Each peer runs twice: with decoding and preprocessing as its
examples write them (`own`), and with this project's decoder (`ours`). Peers answer ids and scores; the service does all
that it does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from benchmarks.closed_loop import Job, body_of, run_job
from benchmarks.peers.environments import FOLDER, ROOT, VERSIONS, NoEnvironment, interpreter
from benchmarks.server import free_port, running_service, split_cores, thread_flags
from benchmarks.synthetic import write_photographs
from evaluation.pages import Bar, bar_plot, page, section, table
from index.bundle import Bundle

IMAGES, CONNECTIONS = 16, 8
ROUNDS, SECONDS, WARM_UP_S = 3, 4.0, 1.0
SMOKE_SECONDS, SMOKE_WARM_UP_S = 3.0, 1.0
_FINAL = (400, 405, 413, 415, 422)  # asked wrongly: asking again gives the same
START_TIMEOUT_S, STOP_TIMEOUT_S = 90, 15
AHEAD = 1.2  # times the best peer that decodes in its own way

Decoder = Literal["own", "ours"]
DECODERS: tuple[Decoder, ...] = ("own", "ours")


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Images a second and p99 of each server, the medians of rounds in which they take turns, and the ratios."""
    generator, service = split_cores()
    runs: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    agreement: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        setup = _Setup(bundle_path, Path(folder), service)
        found: list[str] = []
        pythons: dict[str, Path] = {}
        for peer in VERSIONS:
            try:
                pythons[peer] = interpreter(peer, make=not smoke)
            except NoEnvironment as error:
                left_out[peer] = str(error)

        def run(url: str, field: str | None, name: str) -> None:
            job = Job(
                url=url, images=setup.images, field=field, connections=CONNECTIONS,
                warm_up_s=SMOKE_WARM_UP_S if smoke else WARM_UP_S, seconds=SMOKE_SECONDS if smoke else SECONDS,
            )  # fmt: skip
            runs.setdefault(name, []).append(run_job(job, Path(folder), generator))

        for _ in range(1 if smoke else ROUNDS):
            with setup.ours() as url:
                found = found or [_first(url, None, image) for image in setup.images]
                run(url, None, "wikiclip")
            for peer, python in pythons.items():
                for decoder in DECODERS[:1] if smoke else DECODERS:
                    name = f"{peer}, {'its own' if decoder == 'own' else 'our'} decoder"
                    if name in left_out:
                        continue
                    try:
                        with setup.peer(peer, python, decoder) as (url, field):
                            firsts = [_first(url, field, image) for image in setup.images]
                            agreement[name] = float(np.mean(np.array(firsts) == np.array(found)))
                            run(url, field, name)
                    except NoEnvironment as error:
                        left_out[name] = str(error)
    systems = {name: {**_median(each), "rounds": each} for name, each in runs.items()}
    for name, share in agreement.items():
        systems[name]["same_first_entity"] = round(share, 3)
    return {
        "systems": systems,
        "ratios": ratios(systems),
        "left_out": left_out,
        "image": "JPEG 1280x960",
        "connections": CONNECTIONS,
        "threads": len(service),
        "cores": {"generator": sorted(generator), "server": sorted(service)},
        "versions": VERSIONS,
    }


def ratios(systems: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times the best peer's images a second this service has, and how many times its p99 the best peer's is,
    against peers with their own decoder and with ours. Above 1 the service is ahead."""
    found = {}
    ours = systems["wikiclip"]
    for kind in ("its own", "our"):
        peers = [each for name, each in systems.items() if name.endswith(f"{kind} decoder") and each["per_s"]]
        if peers:
            found[f"{kind} decoder"] = {
                "throughput": round(ours["per_s"] / max(each["per_s"] for each in peers), 3),
                "p99": round(min(each["p99_ms"] for each in peers) / ours["p99_ms"], 3),
            }
    return found


def report(figures: dict[str, Any]) -> str:
    """An HTML page: images a second and p99 of each server, and who was left out and why."""
    systems = figures["systems"]
    plots = [
        bar_plot(
            [Bar(name=name, value=each[key]) for name, each in systems.items() if each[key] is not None],
            title=title,
            x_label=label,
        )
        for key, title, label in (
            ("per_s", "Images a second, more is better", "images/s"),
            ("p99_ms", "p99, less is better", "ms"),
        )
    ]
    keys = ("per_s", "p50_ms", "p99_ms", "failures", "same_first_entity")
    rows = [[name, *(str(each.get(key, "")) for key in keys)] for name, each in systems.items()]
    cores = figures["cores"]
    said = (
        f"<p>{figures['image']}, {figures['connections']} connections, closed loop; server on {len(cores['server'])} "
        f"core(s) with {figures['threads']} thread(s), load generator on {len(cores['generator'])}. Medians of rounds "
        "in which the servers take turns.</p>"
    )
    blocks = [section("Images a second and p99", said, *plots, table(("server", *keys), rows))]
    ahead = [[kind, str(each["throughput"]), str(each["p99"])] for kind, each in figures["ratios"].items()]
    if ahead:
        note = f"<p>Above 1 this service is ahead. Aimed at: {AHEAD} in throughput with their own decoder.</p>"
        blocks.append(section("Against the best peer", note, table(("peers with", "throughput", "p99"), ahead)))
    if figures["left_out"]:
        blocks.append(section("Left out", table(("server", "why"), [[*each] for each in figures["left_out"].items()])))
    return page("Other servers", "\n".join(blocks))


class _Setup:
    """The files that all servers share, and how each is started."""

    def __init__(self, bundle_path: Path, work: Path, cores: set[int]) -> None:
        self._bundle_path, self._work, self._cores = bundle_path, work, cores
        self.images = write_photographs(work, IMAGES, 1280, 960)
        bundle = Bundle.open(bundle_path)
        embeddings = bundle.embeddings()
        np.save(work / "vectors.npy", np.concatenate(list(embeddings)))
        with bundle.store() as store:
            ids = [entity.entity_id for entity in store.by_rows(range(len(store)))]
        (work / "ids.json").write_text(json.dumps([ids[row] for row in embeddings.rows_N]), encoding="utf-8")
        entry = bundle.manifest.image_encoder
        self._job = {
            "onnx": str(bundle.image_encoder_path.resolve()),
            "input": entry.input,
            "output": entry.outputs[1],
            "vectors": str(work / "vectors.npy"),
            "ids": str(work / "ids.json"),
            "preprocessing": dict(bundle.manifest.preprocessing),
            "threads": len(cores),
            "cores": len(cores),
        }

    @contextmanager
    def ours(self) -> Iterator[str]:
        flags = ("--cache", "off", "--device", "cpu", *thread_flags(len(self._cores)))
        with running_service(self._bundle_path, *flags, "--log-level", "warning", cores=self._cores) as url:
            yield f"{url}/recognize?top_k=5"

    @contextmanager
    def peer(self, peer: str, python: Path, decoder: Decoder) -> Iterator[tuple[str, str | None]]:
        """Yields the URL to post to and the form's field, None for a bare body. Raises `NoEnvironment` if it fails."""
        path = self._work / f"{peer}.json"
        path.write_text(json.dumps({**self._job, "decoder": decoder}), encoding="utf-8")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        module = f"benchmarks.peers.serve_{peer}"
        command, target, field = {
            "litserve": ([python, "-m", module, str(port)], f"{url}/predict", "image"),
            "mosec": ([python, "-m", module, "--port", str(port), "--address", "127.0.0.1"], f"{url}/inference", None),
            "bentoml": (
                [python, "-m", "bentoml", "serve", f"{module}:Recognise", "--port", str(port), "--host", "127.0.0.1"],
                f"{url}/{'predict' if decoder == 'own' else 'predict_file'}",
                "image",
            ),
        }[peer]
        environment = {
            **os.environ, "PEER_JOB": str(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(len(self._cores)),
            "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(FOLDER / "bentoml-home"), "NO_COLOR": "1",
        }  # fmt: skip
        log = self._work / f"{peer}.log"
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)  # inherited, by whatever processes the server starts
        try:
            with log.open("wb") as said:
                process = subprocess.Popen(
                    list(map(str, command)), cwd=self._work, env=environment, stdout=said, stderr=said,
                    start_new_session=True,
                )  # fmt: skip
        finally:
            os.sched_setaffinity(0, before)
        try:
            _wait(process, target, field, self.images[0], log)
            yield target, field
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, field: str | None, image: str, log: Path) -> None:
    """Until a photograph is recognised."""
    deadline = time.monotonic() + START_TIMEOUT_S
    problem = "it did not answer"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if _first(url, field, image):
                return
        except httpx.TransportError:
            time.sleep(0.1)  # between two looks at a port that does not listen yet
        except httpx.HTTPStatusError as error:
            problem = f"status {error.response.status_code}"
            if error.response.status_code in _FINAL:
                break
            time.sleep(0.1)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise NoEnvironment(f"it does not serve ({problem}): {' '.join(last)[:300]}")


def _first(url: str, field: str | None, image: str) -> str:
    """The first entity that a server finds in an image."""
    body, content_type = body_of(Path(image).read_bytes(), field)
    answer = httpx.post(url, content=body, headers={"Content-Type": content_type}, timeout=60).raise_for_status().json()
    return str(answer["predictions"][0]["entity_id"] if "predictions" in answer else answer["entities"][0])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and all processes it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=STOP_TIMEOUT_S)
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round in the middle by images a second: its figures belong together."""
    return sorted(rounds, key=lambda each: float(each["per_s"]))[len(rounds) // 2]
