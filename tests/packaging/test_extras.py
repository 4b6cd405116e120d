"""Without a package of an extra, every command and the library say in one line which extra to install."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from core.errors import EXTRAS, needed_by
from wikiclip.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
NOT_IMPORTED = {"gpu", "docs", "test"}  # `gpu` has the modules of `cpu`; no code imports the others
PROBE = """
import contextlib, io, json, sys

from core.errors import EXTRAS

modules = {name for names in EXTRAS.values() for name in names}
# FastAPI depends on opentelemetry's interface; the extra adds the rest of it.
modules = modules - {"opentelemetry"} | {"opentelemetry.sdk", "opentelemetry.exporter"}
sys.modules.update(dict.fromkeys(modules))  # as if they were not installed

from wikiclip import cli

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, said.getvalue().splitlines()[-1]]))
import wikiclip

try:
    wikiclip.Recognizer
except ImportError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def test_the_table_covers_the_extras_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - NOT_IMPORTED
    for extra, modules in EXTRAS.items():
        packages = [re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in declared[extra]]  # type: ignore[index]
        packages = [package for package in packages if package != "wikiclip_serve"]  # another extra
        for package in packages:
            assert package.startswith(modules), f"{extra} installs {package}"


def test_every_command_and_the_library_name_the_extra(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "catalog.parquet").write_bytes(b"PAR1")
    (tmp_path / "cirrus.json").write_text("{}\n{}\n")
    (tmp_path / "giraffe.png").write_bytes(b"image")
    bundle, catalog, out = str(small_bundle), str(tmp_path / "catalog.parquet"), str(tmp_path / "out")
    expected: dict[str, tuple[str, list[str]]] = {
        "up": ("export", [str(tmp_path), "--image-encoder", "tiny", "--out", out, "--no-serve"]),
        "catalog": ("export", ["--content", str(tmp_path / "cirrus.json"), "--out", f"{out}.parquet"]),
        "fetch-images": ("export", ["--catalog", catalog, "--out", out, "--contact", "me@example.org"]),
        "credits": ("export", ["--catalog", catalog, "--out", f"{out}.jsonl", "--contact", "me@example.org"]),
        "train": (
            "export",
            ["--catalog", catalog, "--pairs", "p", "--image-encoder", "tiny", "--text-encoder", "minilm", "--out", out],
        ),
        "export": ("export", ["--catalog", catalog, "--checkpoint", "c", "--out", out]),
        "index": ("cpu", ["--bundle", bundle]),
        "serve": ("cpu", ["--bundle", bundle, "--port", "0"]),
        "recognize": ("cpu", [str(tmp_path / "giraffe.png"), "--bundle", bundle]),
        "embed": ("cpu", [str(tmp_path / "giraffe.png"), "--bundle", bundle, "--out", f"{out}.npy"]),
        "mcp": ("mcp", ["--url", "http://127.0.0.1:1"]),
        "evaluate": ("cpu", ["--bundle", bundle, "--queries", "q", "--out", f"{out}.jsonl"]),
        "inspect": ("cpu", [bundle]),
        "bundle": ("cpu", ["push", bundle, "s3://bucket/one"]),
        "bench": ("export", ["claim", "--smoke", "--bundle", bundle, "--results", out]),
    }
    assert set(expected) == set(COMMANDS)
    arguments = json.dumps([[name, *given] for name, (_, given) in expected.items()])
    done = subprocess.run([sys.executable, "-c", PROBE, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *commands, library = map(json.loads, done.stdout.splitlines())
    for (name, (extra, _)), (code, said) in zip(expected.items(), commands, strict=True):
        assert code == 2
        assert re.fullmatch(rf"error: 'wikiclip {name}' needs \w+: pip install 'wikiclip-serve\[{extra}\]'", said), said
    assert library == ["MissingExtra", "wikiclip.Recognizer needs faiss: pip install 'wikiclip-serve[cpu]'"]


def test_any_other_missing_module_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needed_by("this"):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
