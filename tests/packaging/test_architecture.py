"""The import directions of docs/architecture.md, and what may never be imported by whom."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import pytest

from core.runtime import blas_kernels

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers"}
DEPENDENCIES = HEAVY | {
    "click",
    "faiss",
    "fastapi",
    "fsspec",
    "httpx",
    "numpy",
    "onnxruntime",
    "orjson",
    "PIL",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "python_multipart",
    "redis",
    "starlette",
    "tqdm",
    "uvicorn",
}


def package_table() -> dict[str, tuple[str, str]]:
    """The rows of the page's table: package name to (what it is, what it may import)."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \| (.+?) \| (.+?) \|$", page, flags=re.MULTILINE)
    return {name: (purpose, allowed) for name, purpose, allowed in rows}


TABLE = package_table()


def allowed_imports(package: str) -> set[str]:
    allowed = TABLE[package][1].strip()
    if allowed == "any":
        return set(TABLE)
    return {package} | ({name.strip() for name in allowed.split(",")} - {"–"})


def source_files(package: str) -> Iterator[Path]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if "build" not in path.relative_to(ROOT / package).parts:
            yield path


def imported_roots(source: str) -> set[str]:
    """The top-level names imported anywhere in a module, inside functions too."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


def test_table_names_every_package() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(TABLE)


def test_page_names_only_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+(?:/\w+)*(?:\.py|/))`", page)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_table_names_only_packages_in_it() -> None:
    for package in TABLE:
        assert allowed_imports(package) <= set(TABLE), package


@pytest.mark.parametrize("package", sorted(TABLE))
def test_imports_follow_the_table(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in source_files(package)
        for name in sorted(imported_roots(path.read_text(encoding="utf-8")) & set(TABLE) - allowed_imports(package))
    ]
    assert not wrong


@pytest.mark.parametrize("package", sorted(name for name, (purpose, _) in TABLE.items() if "no torch" in purpose))
def test_packages_without_torch_name_none(package: str) -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in source_files(package)
        if imported_roots(path.read_text(encoding="utf-8")) & HEAVY
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        # The whole serving path, recogniser and console command included.
        ("service.app, service.recognizer, service.cli, wikiclip.client, index.bundle", HEAVY | {"model", "export"}),
        # Printing help stays quick because the commands' modules are light.
        (
            "wikiclip.cli, wikiclip.commands, "
            "catalog.cli, service.cli, index.cli, model.cli, export.cli, benchmarks.cli",
            HEAVY | {"numpy", "fastapi", "onnxruntime", "faiss", "PIL", "pydantic"},
        ),
    ],
    ids=["serving", "console"],
)
def test_importing_pulls_in_nothing_heavy(modules: str, banned: set[str]) -> None:
    probe = f"import sys, {modules}; print(*sorted({banned!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


FOREIGN = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        root = name.partition(".")[0]
        if root in {blocked!r}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocked())
import service, index
assert service.OWNER == index.OWNER == "application"
{probe}
"""
CLIENTS = """
import httpx
from wikiclip import AsyncClient, Client, Recognition, TooManyRequests, UserError

def answer(request):
    return httpx.Response(200, json={"model": "m", "bundle": "b@1", "cached": False, "known": 0.5, "abstained": False,
                                     "predictions": [], "timings_ms": {}})

with Client("http://service") as client:
    client._http = httpx.Client(base_url="http://service", transport=httpx.MockTransport(answer))
    assert client.recognize(b"image").in_catalog_probability == 0.5
assert issubclass(TooManyRequests, UserError)
"""


@pytest.mark.parametrize(
    ("probe", "installed"),
    [
        ("import wikiclip", set()),
        ("import runpy; sys.argv = ['wikiclip', '--help']; runpy.run_module('wikiclip', run_name='__main__')", set()),
        (CLIENTS, {"httpx", "pydantic"}),
    ],
    ids=["import", "help", "clients"],
)
def test_the_public_package_works_next_to_the_packages_of_an_application(
    probe: str, installed: set[str], tmp_path: Path
) -> None:
    """`service/` and `index/` are the application's, and nothing else of ours or of our dependencies is there."""
    for package in ("service", "index"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('OWNER = "application"')
    (tmp_path / "site" / "wikiclip").mkdir(parents=True)
    for path in (ROOT / "wikiclip").glob("*.py"):
        shutil.copy(path, tmp_path / "site" / "wikiclip")
    blocked = (set(TABLE) | DEPENDENCIES) - {"wikiclip", "service", "index"} - installed
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN.format(blocked=blocked, probe=probe)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'site'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


NATIVE = {"faiss", "onnxruntime"}


@pytest.mark.parametrize("package", sorted(TABLE))
def test_native_libraries_are_imported_through_core_runtime(package: str) -> None:
    """At module level nobody else imports them, so they are configured whatever is imported first."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source_files(package)
        if path != ROOT / "core" / "runtime.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and imported_roots(ast.unparse(node)) & NATIVE
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("sse sse2 ssse3", None),
        ("avx avx2 fma", "Haswell"),
        ("avx avx2 fma avx512f avx512cd", "Haswell"),  # Knights Landing
        ("avx2 fma avx512f avx512bw avx512cd avx512dq avx512vl amx_tile", "SkylakeX"),
    ],
)
def test_kernels_by_what_a_processor_can_do(flags: str, kernels: str | None) -> None:
    assert blas_kernels(set(flags.split())) == kernels


PROBE = """
import ctypes, json, sys, {module}
kernels, loaded = None, sorted(set(sys.modules).intersection(("faiss", "onnxruntime")))
if "faiss" in loaded and len(sys.argv) > 1:
    blas = ctypes.CDLL(sys.argv[1])
    blas.openblas_get_corename.restype = ctypes.c_char_p
    kernels = blas.openblas_get_corename().decode()
print(json.dumps([loaded, kernels]))
"""


def import_in_process(module: str, home: Path, **settings: str) -> tuple[list[str], str | None]:
    """Import `module` in a process whose home folder is `home`.

    Returns the native libraries that this loads, and the kernels of faiss's OpenBLAS. They are None without faiss, and
    if this faiss brings no OpenBLAS (that of GPUs, and that of macOS).
    """
    libraries = sorted((Path(faiss.__file__).parent.parent / "faiss_cpu.libs").glob("libopenblas*.so"))
    unset = {"ORT_DISABLE_TELEMETRY", "OPENBLAS_CORETYPE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, "-c", PROBE.format(module=module), *map(str, libraries[:1])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, kernels = json.loads(done.stdout)
    return loaded, kernels


@pytest.mark.parametrize(
    ("module", "libraries"),
    [
        ("index.search", ["faiss"]),
        ("model.losses", ["faiss"]),
        ("export.onnx", ["onnxruntime"]),
        ("service.recognizer", ["faiss", "onnxruntime"]),
        ("service.app", ["faiss", "onnxruntime"]),
        ("wikiclip; wikiclip.Recognizer", ["faiss", "onnxruntime"]),
    ],
)
def test_native_libraries_are_configured_whatever_is_imported_first(
    module: str, libraries: list[str], tmp_path: Path
) -> None:
    """faiss uses the processor's best kernels. ONNX Runtime, whose telemetry would write an id of the machine into the
    user's cache folder, writes nothing there."""
    loaded, kernels = import_in_process(module, tmp_path)
    assert loaded == libraries
    assert [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name] == []
    if kernels is not None:
        flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        best = blas_kernels(set(flags[1].split())) if flags else None
        assert best in (kernels, None)  # None: without AVX2, OpenBLAS chooses by itself


@pytest.mark.parametrize("module", ["index.search", "service.app"])
def test_kernels_set_by_the_user_are_kept(module: str, tmp_path: Path) -> None:
    _, kernels = import_in_process(module, tmp_path, OPENBLAS_CORETYPE="Nehalem")
    assert kernels in ("Nehalem", None)
