"""POST /feedback: embeddings with their entities, in a file that processes share."""

from __future__ import annotations

import base64
import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import wikiclip
from core.errors import FeedbackFileError, UserError
from core.lines import append_row
from service.app import create_app
from service.settings import Settings
from tests.conftest import EMBEDDING_DIM

PNG = {"Content-Type": "image/png"}


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_all_forms_are_kept_as_embeddings(serve, small_bundle, tmp_path, giraffe):
    path = tmp_path / "feedback.jsonl"
    with serve(small_bundle, feedback_file=path) as client:
        found = client.post("/embed", content=giraffe, headers=PNG).json()
        query = {key: found[key] for key in ("embedding", "encoder")}
        region = client.post("/embed", content=giraffe, headers=PNG, params={"box": "0,0,0.5,0.5"}).json()
        answers = [
            client.post("/feedback", params={"entity_id": "Q140"}, **form)
            for form in (
                {"content": giraffe, "headers": PNG},
                {"files": {"image": ("giraffe.png", giraffe, "image/png")}},
                {"json": {"image": {"base64": base64.b64encode(giraffe).decode()}}},
                {"json": query},
                {"json": {"embedding": [3 * value for value in found["embedding"]]}},
            )
        ]
        boxed = client.post(
            "/feedback", params={"entity_id": "Q89", "box": "0,0,0.5,0.5"}, content=giraffe, headers=PNG
        )
    assert [answer.status_code for answer in (*answers, boxed)] == [201] * 6
    rows = rows_of(path)
    assert [row["data_id"] for row in rows] == [answer.json()["data_id"] for answer in (*answers, boxed)]
    assert len({row["data_id"] for row in rows}) == 6
    for row in rows[:5]:
        assert {**row, "data_id": "", "embedding": []} == {
            "data_id": "", "entity_id": "Q140", "data_split": "feedback", "embedding": [], "encoder": found["encoder"]
        }  # fmt: skip
    assert [row["embedding"] for row in rows[:4]] == [found["embedding"]] * 4
    assert rows[4]["embedding"] == pytest.approx(found["embedding"], abs=1e-6)
    assert (rows[5]["entity_id"], rows[5]["embedding"]) == ("Q89", region["embedding"])
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("entity_id", "form", "status"),
    [
        ("nothing", {"json": {"embedding": [1.0] * EMBEDDING_DIM}}, 404),
        (None, {"json": {"embedding": [1.0] * EMBEDDING_DIM}}, 422),
        ("", {"json": {"embedding": [1.0] * EMBEDDING_DIM}}, 422),
        ("Q140", {"json": {"embedding": [1.0] * (EMBEDDING_DIM + 1)}}, 422),
        ("Q140", {"json": {"embedding": [0.0] * EMBEDDING_DIM}}, 422),
        ("Q140", {"json": {"embedding": [1.0] * EMBEDDING_DIM, "encoder": "0" * 64}}, 409),
        ("Q140", {"json": {"text": "a lion"}}, 400),
        ("Q140", {"content": b"", "headers": PNG}, 400),
        ("Q140", {"content": b"no image", "headers": PNG}, 422),
        ("Q140", {"content": b"no image", "headers": {"Content-Type": "text/plain"}}, 415),
    ],
)
def test_bad_feedback_is_refused_and_not_kept(serve, small_bundle, tmp_path, entity_id, form, status):
    with serve(small_bundle, feedback_file=tmp_path / "feedback.jsonl") as client:
        parameters = {} if entity_id is None else {"entity_id": entity_id}
        answer = client.post("/feedback", params=parameters, **form)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert not (tmp_path / "feedback.jsonl").exists()


def test_it_is_off_by_default_and_needs_what_recognize_needs(service, serve, small_bundle, tmp_path, giraffe):
    asked = {"params": {"entity_id": "Q140"}, "content": giraffe}
    off = service.post("/feedback", headers=PNG, **asked)
    assert (off.status_code, "WIKICLIP_FEEDBACK_FILE" in off.json()["detail"]) == (403, True)
    path = tmp_path / "feedback.jsonl"
    with serve(small_bundle, feedback_file=path, api_keys=("key",), admin_token="admin", rate_limit="2/hour") as client:
        assert client.post("/feedback", headers=PNG, **asked).status_code == 401
        statuses = [
            client.post("/feedback", headers={**PNG, "X-API-Key": "key"}, **asked).status_code for _ in range(3)
        ]
    assert statuses == [201, 201, 429]
    assert len(rows_of(path)) == 2


def test_a_file_that_cannot_be_written_is_503_and_the_service_lives(serve, small_bundle, tmp_path, giraffe):
    path = tmp_path / "feedback.jsonl"
    path.mkdir()
    with (
        serve(small_bundle, feedback_file=path) as service,
        wikiclip.Client(str(service.base_url), retries=0) as client,
    ):
        with pytest.raises(wikiclip.Unavailable, match="check FEEDBACK_FILE"):
            client.feedback("Q15083", giraffe)
        assert client.recognize(giraffe).predictions[0].entity_id == "Q15083"
        path.rmdir()
        embedding = client.embed(giraffe)
        assert client.feedback("Q15083", giraffe).entity_id == "Q15083"
        assert client.feedback("Q15083", embedding=embedding).data_id
        with pytest.raises(wikiclip.NotFound):
            client.feedback("nothing", giraffe)
    assert len(rows_of(path)) == 2
    with pytest.raises(UserError, match="does not exist"):
        create_app(Settings(bundle=small_bundle, feedback_file=tmp_path / "missing" / "feedback.jsonl"))


def test_a_full_disk_leaves_complete_lines(tmp_path):
    path = tmp_path / "feedback.jsonl"
    append_row(path, {"number": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))  # the first bytes of the next row are written
    try:
        for _ in range(2):
            with pytest.raises(FeedbackFileError, match="was not kept"):
                append_row(path, {"number": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    append_row(path, {"number": 3})
    assert rows_of(path) == [{"number": 1}, {"number": 3}]


def test_a_line_that_a_crash_cut_off_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(b'{"number": 1}\n{"num')
    append_row(path, {"number": 2})
    assert path.read_bytes() == b'{"number": 1}\n{"num\n{"number": 2}\n'


WRITER = """
import sys
from pathlib import Path
from core.lines import append_row

for number in range(10**9):
    append_row(Path(sys.argv[1]), {"writer": sys.argv[2], "number": number, "padding": [0.123456789] * 400})
    print(number, flush=True)
"""


def test_processes_share_the_file_and_acknowledged_rows_survive_sigkill(tmp_path):
    path = tmp_path / "feedback.jsonl"
    acknowledged: Counter[str] = Counter()
    writers = {
        name: subprocess.Popen([sys.executable, "-c", WRITER, path, name], stdout=subprocess.PIPE, text=True)
        for name in "abc"
    }
    for count, (name, writer) in enumerate(writers.items(), 1):
        for _ in range(20 * count):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        acknowledged[name] = 20 * count + len(writer.stdout.read().split())
        writer.wait()
        writer.stdout.close()
    append_row(path, {"writer": "last"})
    lines = path.read_bytes().splitlines()
    rows, torn = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            torn += 1
    assert torn <= len(writers)
    kept = Counter(row["writer"] for row in rows)
    assert all(acknowledged[name] <= kept[name] <= acknowledged[name] + 1 for name in writers)
    for name in writers:
        assert [row["number"] for row in rows if row["writer"] == name] == list(range(kept[name]))
