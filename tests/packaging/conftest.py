"""Runs the shell blocks of a page of docs/ as a reader would, one after the other, in a folder like a fresh clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_BLOCK = re.compile(r"^```sh\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
IN_A_CLONE = ("demo", "examples", "docs", "tests", "docker-compose.yml")
SHOWN_ADDRESS = "http://127.0.0.1:8000"
BLOCK_TIMEOUT_S = 900  # generous: a busy machine is no failure


@dataclass
class PageRun:
    """What came of a page: its blocks and what each wrote to standard output, in order."""

    folder: Path
    blocks: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def after(self, start: str) -> str:
        """What the blocks that hold a line beginning so have printed."""
        found = [out for block, out in zip(self.blocks, self.printed, strict=True) if f"\n{start}" in f"\n{block}"]
        assert found, f"no block has a line that begins with {start}"
        return "".join(found)


@pytest.fixture(scope="session")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., PageRun]]:
    """Runs the ```sh blocks of a page, after `prepare` of its folder.

    A block that is `wikiclip serve ...` or `wikiclip up ...` stays up until all pages have been run. It gets a free
    port, and later blocks ask there instead of at port 8000.
    """
    with ExitStack() as services:

        def run(page: str, prepare: Callable[[Path], None] | None = None, **environment: str) -> PageRun:
            folder = tmp_path_factory.mktemp(page)
            for name in IN_A_CLONE:
                (folder / name).symlink_to(ROOT / name)
            if prepare is not None:
                prepare(folder)
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("WIKICLIP_")}
            env = {
                **inherited,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "XDG_CACHE_HOME": str(folder / "cache"),
                "OMP_NUM_THREADS": "1",
                **environment,
            }
            done = PageRun(folder)
            address = SHOWN_ADDRESS
            for block in RUN_BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")):
                done.blocks.append(block)
                if re.match(r"(\w+=\S+ )*wikiclip (serve|up) ", block):
                    address = services.enter_context(served(block, folder, {**env, "WIKICLIP_PORT": "0"}))
                    done.printed.append("")
                    continue
                script = block.replace(SHOWN_ADDRESS, address)
                command = ["bash", "-euo", "pipefail", "-c", script]
                ended = subprocess.run(
                    command, cwd=folder, env=env, capture_output=True, text=True, timeout=BLOCK_TIMEOUT_S, check=False
                )
                assert ended.returncode == 0, f"{page}.md:\n{script}\n{ended.stdout}\n{ended.stderr}"
                done.printed.append(ended.stdout)
            return done

        yield run


@contextmanager
def served(block: str, folder: Path, env: dict[str, str]) -> Iterator[str]:
    """The address of the service that a block starts, once it is ready."""
    command = ["bash", "-euc", re.sub(r"(?=wikiclip (serve|up) )", "exec ", block, count=1)]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log: list[str] = []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail(f"the service did not start:\n{''.join(log)}")
        # The rest of the log is taken too: a full pipe would stop the service.
        reader = threading.Thread(target=log.extend, args=(process.stderr,))
        reader.start()
        try:
            # The address is printed just before the service listens, so the transport retries with growing pauses.
            with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=60) as client:
                assert client.get(f"{found[1]}/readyz").status_code == 200, "".join(log)
            yield found[1]
        finally:
            process.terminate()
            reader.join()
