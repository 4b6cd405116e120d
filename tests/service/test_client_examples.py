"""The clients of docs/clients.md: its examples, and a client that is generated from /openapi.json."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wikiclip import Client

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def example(language: str, service) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return block.replace("http://127.0.0.1:8000", str(service.base_url).rstrip("/"))


@pytest.fixture
def folder(small_images, tmp_path) -> Path:
    for name, entity_id in (("giraffe.png", "Q15083"), ("lion.png", "Q140")):
        (tmp_path / name).write_bytes(small_images[entity_id])
    return tmp_path


def test_python(service, folder):
    command = [sys.executable, "-c", example("python", service)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, giraffe, lion, url = done.stdout.splitlines()
    assert re.fullmatch(r"Girafe [0-9a-f]{32}", first)
    assert "title='Giraffe'" in giraffe
    assert "title='Lion'" in lion
    assert url == "https://en.wikipedia.org/wiki/Giraffe"


def test_javascript(service, folder):
    node = shutil.which("node")
    if node is None:
        pytest.fail("node is not there: run `make setup` (or `make test`)", pytrace=False)
    ask = """
import { openAsBlob } from 'node:fs';
console.log(JSON.stringify(await recognize(await openAsBlob('giraffe.png'))));
console.log(await recognize(new Blob(['no image'])).catch((error) => error.message));
"""
    (folder / "ask.mjs").write_text(example("js", service) + ask)
    done = subprocess.run([node, "ask.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert [each["rank"] for each in json.loads(found)] == [1, 2, 3]
    assert json.loads(found)[0]["title"] == "Giraffe"
    assert re.fullmatch(r".*not an image.* \([0-9a-f]{32}\)", refused)


def test_a_generated_client(service, folder, small_images, monkeypatch):
    (folder / "config.yaml").write_text("post_hooks: []\n" + example("yaml", service))
    (folder / "openapi.json").write_bytes(service.get("/openapi.json").content)
    command = ["generate", "--path", "openapi.json", "--config", "config.yaml", "--meta", "none", "--fail-on-warning"]
    generate = [sys.executable, "-m", "openapi_python_client", *command, "--output-path", "generated_client"]
    done = subprocess.run(generate, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    monkeypatch.syspath_prepend(folder)
    client, models, types, recognize = (
        importlib.import_module(f"generated_client.{name}")
        for name in ("client", "models", "types", "api.recognition.recognize")
    )
    for operation in ("entities.search_entities", "administration.swap_bundle", "operations.get_readiness"):
        assert callable(importlib.import_module(f"generated_client.api.{operation}").sync)
    image = types.File(payload=io.BytesIO(small_images["Q140"]), file_name="lion.png", mime_type="image/png")
    with client.Client(base_url=str(service.base_url)) as generated:
        answer = recognize.sync(client=generated, body=models.RecognizeFilesBody(image=image), top_k=2)
    assert [each.rank for each in answer.predictions] == [1, 2]
    assert answer.predictions[0].entity_id == "Q140"


def test_the_document_names_operations_tags_the_server_and_a_fault(service):
    document = service.get("/openapi.json").json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = {each["operationId"] for each in operations}
    assert names >= {"recognize", "recognize_batch", "search_entities", "put_entity", "swap_bundle"}
    assert names - {"get_liveness", "get_readiness", "get_info", "get_metrics"} <= set(dir(Client))
    assert document["servers"][0]["url"] == "/"
    for each in operations:
        assert len(each["tags"]) == 1
        assert "application/problem+json" in each["responses"]["500"]["content"]
