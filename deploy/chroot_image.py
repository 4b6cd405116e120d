"""The image of the service without a container engine: what the Dockerfile says, done in a clean Debian root.

    sudo python -m deploy.chroot_image [--work build/image] [--mirror URL]

Needs root, debootstrap, and pip with a registry. Every instruction of the target, and of the stages it copies from, is
read from the Dockerfile and carried out with chroot. What differs from a build by an engine:

- `python:3.11-slim-bookworm` is replaced by Debian bookworm from debootstrap (`minbase`) with Debian's own python3.11,
  without what Debian's slim images leave out: documentation, manuals, translations, package lists.
- Debian's Python is 3.11.2, and below 3.11.3 the Redis client wants one small package more: it is added to the lock.
- The locked wheels are downloaded outside, and pip inside is given that folder and no registry.

Then the service is started from it as the image's user, on a root that is mounted read-only, with the demo's bundle: it
must be ready, healthy by the image's own check, and recognise an image. Prints figures as JSON; exit 1 past a bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.dockerfile import Instruction, environment, read_dockerfile

ROOT = Path(__file__).resolve().parents[1]
BASE_IMAGE = "python:3.11-slim-bookworm"
SUITE = "bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
NOT_IN_SLIM = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/apt/lists", "var/cache/apt",
    "var/cache/debconf", "var/log",
)  # fmt: skip
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MOST_BYTES = 600_000_000
MOST_START_S = 3.0
STARTS = 3
TIMEOUT_S = 120
WHEELS = "wheels"
LOCK = "requirements-serving.lock"
WANTED_BY_OLDER_PYTHON = "async-timeout==5.0.1"
WANTED_SHA256 = "39e3809566ff85354557ec2398b55e096c8364bacac9405a7a1fa429e77fe76c"


@dataclass
class Stage:
    """A stage of the Dockerfile as far as it has been carried out: its file system, and what its instructions set."""

    root: Path
    folder: str = "/"
    user: str = "0"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH, "HOME": "/root"})
    commands: int = 0
    said: dict[str, str] = field(default_factory=dict)  # ENTRYPOINT, CMD, HEALTHCHECK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "image", help="Folder for the file systems.")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="Debian's mirror, for debootstrap.")
    parser.add_argument("--target", default="cpu", help="Stage of the Dockerfile.")
    given = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("error: this needs root and debootstrap; on Debian: apt-get install debootstrap")
    given.work.mkdir(parents=True, exist_ok=True)
    image = build(given.work, given.target, given.mirror)
    figures = {"target": given.target, "commands": image.commands, **sizes(image.root), **tried(image)}
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    past = [
        f"{name} is {figures[name]}, past {bound}"
        for name, bound in (("bytes", MOST_BYTES), ("start_to_ready_s", MOST_START_S))
        if figures[name] > bound
    ]
    if past:
        sys.exit(f"error: {'; '.join(past)}")


def build(work: Path, target: str, mirror: str) -> Stage:
    """Carry out the target and the stages that it needs, in the order of the file."""
    instructions = read_dockerfile(ROOT / "Dockerfile")
    base, wheels = debian(work, mirror), download(work)
    needed = {target}
    for each in reversed(instructions):
        if each.stage in needed and each.rest.startswith("--from="):
            needed.add(each.rest.split()[0].removeprefix("--from="))
    stages: dict[str, Stage] = {}
    for each in instructions:
        if each.stage not in needed:
            continue
        if each.name == "FROM":
            start = each.rest.split()[0]
            if start != BASE_IMAGE:
                sys.exit(f"error: {each.stage} starts from {start}; only {BASE_IMAGE} has a stand-in here")
            tell(f"{each.stage}: FROM {start}, by its stand-in")
            root = work / each.stage
            shutil.rmtree(root, ignore_errors=True)
            run("cp", "-a", "--reflink=auto", str(base), str(root))
            stages[each.stage] = Stage(root=root)
        else:
            carry_out(each, stages, wheels)
    shutil.rmtree(stages[target].root / WHEELS, ignore_errors=True)
    stages[target].commands = sum(stage.commands for stage in stages.values())
    return stages[target]


def debian(work: Path, mirror: str) -> Path:
    """The stand-in for the base image, made once."""
    base = work / "base"
    if not base.exists():
        tell(f"debootstrap {SUITE}")
        making = work / "base.partial"
        shutil.rmtree(making, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(making), mirror)
        for name in NOT_IN_SLIM:
            shutil.rmtree(making / name, ignore_errors=True)
        making.rename(base)
    return base


def download(work: Path) -> Path:
    """The locked wheels, and the backend that builds this project's own: from the registry that pip here knows."""
    wheels = work / WHEELS
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels)]
    pip += ["--python-version", "3.11", "--only-binary", ":all:"]
    tell("pip download, outside")
    run(*pip, "--require-hashes", "--requirement", str(ROOT / LOCK))
    run(*pip, "hatchling", WANTED_BY_OLDER_PYTHON)
    return wheels


def carry_out(each: Instruction, stages: Mapping[str, Stage], wheels: Path) -> None:
    stage = stages[each.stage]
    stage.commands += 1
    tell(f"{each.stage}: {each.name} {each.rest[:100]}")
    match each.name:
        case "RUN":
            if not (stage.root / WHEELS).exists():
                run("cp", "-a", "--reflink=auto", str(wheels), str(stage.root / WHEELS))
            registry = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"/{WHEELS}"}
            variables = [f"{name}={value}" for name, value in {**stage.environment, **registry}.items()]
            entered = f"cd {shlex.quote(stage.folder)} && {each.rest}"
            run("chroot", str(stage.root), "/usr/bin/env", "-i", *variables, "/bin/sh", "-c", entered)
        case "COPY":
            copy(each.rest.split(), stage, stages)
        case "WORKDIR":
            stage.folder = each.rest
            (stage.root / each.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = each.rest
        case "ENV":
            for name, value in environment([each], each.stage).items():
                stage.environment[name] = value.replace("$PATH", stage.environment["PATH"])
        case "ENTRYPOINT" | "CMD" | "HEALTHCHECK":
            stage.said[each.name] = each.rest
        case "EXPOSE":
            pass
        case _:
            sys.exit(f"error: {each.name} is not known here")


def copy(words: Sequence[str], stage: Stage, stages: Mapping[str, Stage]) -> None:
    context = ROOT
    if words[0].startswith("--from="):
        context, words = stages[words[0].removeprefix("--from=")].root, words[1:]
    *sources, target = words
    into = stage.root / os.path.join(stage.folder, target).lstrip("/")
    for source in sources:
        place = context / source.lstrip("/")
        # A folder is copied by what is in it, a file under its own name where the target is a folder.
        goal = into if place.is_dir() or not target.endswith("/") else into / place.name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            caches = shutil.ignore_patterns("__pycache__") if context == ROOT else None
            shutil.copytree(place, goal, symlinks=True, dirs_exist_ok=True, ignore=caches)
        else:
            shutil.copy2(place, goal)
        if place.name == LOCK:
            with goal.open("a", encoding="utf-8") as lock:
                lock.write(f"{WANTED_BY_OLDER_PYTHON} --hash=sha256:{WANTED_SHA256}\n")


def sizes(root: Path) -> dict[str, Any]:
    """Bytes of the files, each once however many names it has, and of the part that is this project's."""
    return {"bytes": bytes_below(root), "bytes_packages": bytes_below(root / "opt" / "wikiclip")}


def bytes_below(folder: Path) -> int:
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        found = path.lstat()
        seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())


def tried(image: Stage) -> dict[str, Any]:
    """Start the service a few times, and ask it something. `start_to_ready_s` is the median, of all in `starts_s`.

    `start_cpu_s` is what the starts took of a core: on a busy machine it says more than the clock.
    """
    starts, cpu = [], []
    answer: dict[str, Any] = {}
    for _ in range(STARTS):
        with started(image) as (process, url, variables):
            begun = time.monotonic()
            until_ready(process, f"{url}/readyz")
            starts.append(round(time.monotonic() - begun, 2))
            cpu.append(cpu_s(process.pid))
            checked(image, process, variables)
            answer = recognise(url)
    return {
        "start_to_ready_s": sorted(starts)[len(starts) // 2],
        "starts_s": starts,
        "start_cpu_s": cpu,
        "user": image.user,
        "root": "read-only",
        "recognised": answer["predictions"][0]["title"],
    }


@contextmanager
def started(image: Stage) -> Iterator[tuple[subprocess.Popen[bytes], str, dict[str, str]]]:
    """The image's command as its user, in mounts of its own: a read-only root, the bundle, temporary files, /proc."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**image.environment, "WIKICLIP_PORT": str(port), "WIKICLIP_HOST": "127.0.0.1"}
    command = [*json.loads(image.said["ENTRYPOINT"]), *json.loads(image.said["CMD"])]
    with tempfile.TemporaryDirectory() as mounted:
        root = shlex.quote(mounted)
        for name in ("bundle", "cache"):
            (image.root / name).mkdir(exist_ok=True)  # an engine makes what it mounts on
        mounts = [
            f"mount --bind {shlex.quote(str(image.root))} {root}",
            f"mount --bind {shlex.quote(str(ROOT / 'demo' / 'bundle'))} {root}/bundle",
            f"mount -o remount,bind,ro {root}/bundle",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            f"mount -t proc proc {root}/proc",
            f"mount -o remount,bind,ro {root}",
        ]
        entered = ["chroot", f"--userspec={image.user}:{image.user}", mounted, "/usr/bin/env", "-i"]
        entered += [f"{name}={value}" for name, value in variables.items()]
        script = " && ".join([*mounts, shlex.join(["exec", *entered, *command])])
        process = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script])
        try:
            yield process, f"http://127.0.0.1:{port}", variables
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


def until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"error: the service ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.01)  # between two looks
    sys.exit(f"error: the service was not ready within {TIMEOUT_S} s")


def checked(image: Stage, process: subprocess.Popen[bytes], variables: Mapping[str, str]) -> None:
    """What the image promises, seen from within the mounts of the service: health, no rights, nothing to write on."""
    inside = ["nsenter", f"--target={process.pid}", "--mount", f"--root=/proc/{process.pid}/root"]
    inside += [f"--setuid={image.user}", f"--setgid={image.user}", "/usr/bin/env", "-i"]
    inside += [f"{name}={value}" for name, value in variables.items()]
    run(*inside, *json.loads(image.said["HEALTHCHECK"].partition("CMD ")[2]))
    written = subprocess.run([*inside, "touch", "/opt/wikiclip/written"], capture_output=True, text=True, check=False)
    if "Read-only file system" not in written.stderr:
        sys.exit(f"error: the root can be written on: {written}")
    torch = subprocess.run([*inside, "python", "-c", "import torch"], capture_output=True, text=True, check=False)
    if "No module named 'torch'" not in torch.stderr:
        sys.exit(f"error: torch is in the image: {torch}")
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    if f"\nUid:\t{image.user}\t{image.user}\t" not in status:
        sys.exit("error: the service runs as somebody else than the image's user")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)  # utime, stime


def recognise(url: str) -> dict[str, Any]:
    image = (ROOT / "demo" / "example.jpg").read_bytes()
    request = urllib.request.Request(f"{url}/recognize", image, {"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        recognised: dict[str, Any] = json.load(answer)
    return recognised


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {shlex.join(command)[:300]} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
