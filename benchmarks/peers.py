"""`wikiclip bench peers`: LitServe, mosec and BentoML with the bundle's ONNX file, compared with this service.

All servers get the same images (1280x960), vectors and threads, in turns. The load generator has one core and the
server the others, where there are two. Each peer runs with the decoding that its examples use (`its own decoder`) and
with ours (`our decoder`). Peers return ids and scores; the service does all its work. Each peer has an environment
below `build/peers/`, which a run without `--smoke` installs from the registry.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.generator import Job, closed_loop, encode_image, free_port, service_process, split_cores, wait_for
from benchmarks.synthetic import write_photographs
from core.errors import UserError
from evaluation.pages import Bars, Report
from index.bundle import Bundle

IMAGES, CONNECTIONS = 16, 8
WARM_UP_S, STOP_TIMEOUT_S = 1.0, 15

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "build" / "peers"
VERSIONS = {"litserve": "0.2.19", "mosec": "0.9.8", "bentoml": "1.4.40"}
SHARED = ("numpy", "pillow", "onnxruntime", "faiss-cpu")  # in the versions installed here
EXTRA = {"litserve": ("python-multipart",)}  # an undeclared dependency
DECODERS = {"own": "its own decoder", "ours": "our decoder"}
REPORT = Report(
    title="Other servers",
    plots=(
        Bars(title="Throughput, more is better", label="images/s", values=("systems/*/per_s",)),
        Bars(title="p99, less is better", label="ms", values=("systems/*/p99_ms",)),
    ),
)


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return the median round of each server, and the ratios of this service to the best peers."""
    generator, cores = split_cores()
    rounds, seconds = (1, 3.0) if smoke else (3, 4.0)
    runs: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}

    def run(name: str, url: str, form_field: str | None) -> list[str]:
        """Measure a server and return the first entity for each image."""
        job = Job(
            url=url, images=images, cores=[*generator], form_field=form_field, connections=CONNECTIONS,
            seconds=WARM_UP_S + seconds,
        )  # fmt: skip
        entities = [_first_entity(url, form_field, image) for image in images]
        runs.setdefault(name, []).append(closed_loop(job, warm_up_s=WARM_UP_S))
        return entities

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = write_photographs(work, IMAGES, 1280, 960)
        shared_job = _write_shared_files(Bundle.open(bundle_path), work)
        for _ in range(rounds):
            with service_process(bundle_path, "--cache", "off", "--device", "cpu", cores=cores) as (_, url):
                expected = run("wikiclip", f"{url}/recognize?top_k=5", None)
            for peer in VERSIONS:
                for decoder in ("own",) if smoke else DECODERS:
                    name = f"{peer}, {DECODERS[decoder]}"
                    if name in left_out:
                        continue
                    try:
                        python = environment_python(peer, install=not smoke)
                        job = {**shared_job, "decoder": decoder}
                        with running_peer(peer, python, job, images[0], work, cores) as (url, form_field):
                            found = run(name, url, form_field)
                    except UserError as error:
                        left_out[name] = error.detail
                    else:
                        runs[name][-1]["same_first_entity"] = round(np.mean(np.array(found) == np.array(expected)), 3)
    # The round with the median throughput, so that figures of one round stay together.
    systems = {name: sorted(rounds, key=itemgetter("per_s"))[len(rounds) // 2] for name, rounds in runs.items()}
    return {
        "systems": systems,
        "ratios": ratios(systems),
        "left_out": left_out,
        "image": "JPEG 1280x960",
        "connections": CONNECTIONS,
        "cores": {"generator": sorted(generator), "server": sorted(cores)},
        "versions": VERSIONS,
    }


def ratios(systems: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return throughput and p99 of this service relative to the best peer, for each decoder. Above 1 it is ahead."""
    found = {}
    service = systems["wikiclip"]
    for kind in DECODERS.values():
        peers = [each for name, each in systems.items() if name.endswith(f", {kind}") and each["per_s"]]
        if peers:
            found[kind] = {
                "throughput": round(service["per_s"] / max(each["per_s"] for each in peers), 3),
                "p99": round(min(each["p99_ms"] for each in peers) / service["p99_ms"], 3),
            }
    return found


def environment_python(peer: str, *, install: bool) -> Path:
    """Return the Python of a peer's environment, which `install` may create. Raise `UserError`."""
    shared = [f"{name}=={version(name)}" for name in (*SHARED, *EXTRA.get(peer, ()))]
    packages = [f"{peer}=={VERSIONS[peer]}", *shared]
    folder = ENVIRONMENTS / peer
    requirements, python = folder / "requirements.txt", folder / "bin" / "python"
    if requirements.exists() and requirements.read_text() == "\n".join(packages):
        return python
    if not install:
        raise UserError("its environment does not exist; a run without --smoke installs it")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [str(python), *pip]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"it cannot be installed: {done.stderr.strip()[-300:]}")
    requirements.write_text("\n".join(packages))
    return python


def _write_shared_files(bundle: Bundle, work: Path) -> dict[str, Any]:
    """Write the vectors and their entity ids, and return the part of the job that all peers share."""
    embeddings = bundle.searched()
    np.save(work / "vectors.npy", np.concatenate(list(embeddings)))
    with bundle.store() as store:
        ids = [entity.entity_id for entity in store.by_rows(embeddings.rows_N.tolist())]
    (work / "ids.json").write_text(json.dumps(ids))
    _, cores = split_cores()
    return {
        "onnx": str(bundle.image_encoder_path.resolve()),
        "input": bundle.manifest.image_encoder.input,
        "output": bundle.manifest.image_encoder.outputs[1],
        "vectors": str(work / "vectors.npy"),
        "ids": str(work / "ids.json"),
        "preprocessing": dict(bundle.manifest.preprocessing),
        "threads": len(cores),
    }


@contextmanager
def running_peer(
    peer: str, python: Path, job: dict[str, Any], image: str, work: Path, cores: set[int]
) -> Iterator[tuple[str, str | None]]:
    """Run a peer, and yield its URL and the form field for images, None for a plain body. Raise `UserError`."""
    (work / "job.json").write_text(json.dumps(job))
    port = str(free_port())
    module = "benchmarks.peer_servers"
    command = [module, "--port", port, "--address", "127.0.0.1"]
    path, form_field = ("inference", None) if peer == "mosec" else ("predict", "image")
    if peer == "bentoml":
        command = ["bentoml", "serve", f"{module}:BentomlPeer", "--port", port, "--host", "127.0.0.1"]
    environment = {
        **os.environ, "PEER_JOB": str(work / "job.json"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(len(cores)),
        "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(ENVIRONMENTS / "bentoml-home"), "NO_COLOR": "1",
    }  # fmt: skip
    url, log = f"http://127.0.0.1:{port}/{path}", work / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), "-m", *command], cwd=work, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    os.sched_setaffinity(process.pid, cores)  # the processes that it will start inherit it

    def is_serving() -> bool:
        if process.poll() is not None:
            raise UserError(f"it ended: {' '.join(log.read_text(errors='replace').splitlines()[-1:])[:300]}")
        with suppress(httpx.HTTPError):
            return bool(_first_entity(url, form_field, image))
        return False

    try:
        wait_for(is_serving, "it did not serve")
        yield url, form_field
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # to every process that it started
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=STOP_TIMEOUT_S)


def _first_entity(url: str, form_field: str | None, image: str) -> str:
    body, content_type = encode_image(Path(image).read_bytes(), form_field)
    answer = httpx.post(url, content=body, headers={"Content-Type": content_type}, timeout=60).raise_for_status().json()
    return str(answer["predictions"][0]["entity_id"] if "predictions" in answer else answer["entities"][0])
