"""`wikiclip export --type-parents`: types below others are found by them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catalog.formats import types_path
from core.errors import CatalogError, UserError
from core.lines import Rejected
from export.cli import summary_lines
from export.config import ExportConfig, read_type_parents
from export.pipeline import export_bundle
from index.bundle import Bundle
from index.manifest import STORE_FILE
from index.types import TypeParents
from tests.export.conftest import CatalogFiles

LINES = [
    json.dumps({"type": "thing", "parents": ["object", "idea"]}),
    "{",
    json.dumps({"type": " ", "parents": []}),
    json.dumps({"type": "thing"}),
    json.dumps({"type": "thing", "parents": "object"}),
    json.dumps({"type": "thing", "parents": ["matter", "object", ""], "label": "a thing"}),
    json.dumps({"type": "thing", "parents": ["\ud800"]}),
    json.dumps({"type": "object", "parents": ["thing"]}),
]


def test_bad_lines_are_rejected_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "parents.jsonl"
    path.write_text("\n".join(LINES))
    rejected: list[Rejected] = []
    rows = read_type_parents(path, rejected.append)
    assert rows == [
        TypeParents(type="thing", parents=("object", "idea", "matter"), label="a thing"),
        TypeParents(type="object", parents=("thing",)),
    ]
    assert [(each.line, each.reason.partition(": ")[0]) for each in rejected] == [
        (line, "parents.jsonl") for line in (2, 3, 4, 5, 7)
    ]
    assert [each.reason.partition(": ")[2] for each in rejected][1:] == [
        "`type` is missing or empty",
        "`parents` is missing",
        "`parents` must be a list of strings",
        "`parents` contains a lone surrogate, which is not a character",
    ]
    assert read_type_parents(None, rejected.append) == []


def test_an_export_keeps_the_parents_given_or_those_next_to_the_catalog(
    tmp_path: Path, catalog: CatalogFiles, checkpoint: Path
) -> None:
    copied = tmp_path / "catalog" / "catalog.jsonl"
    shutil.copytree(catalog.path.parent, copied.parent)
    parents = tmp_path / "parents.jsonl"
    parents.write_text("\n".join(LINES))
    plain = ExportConfig(catalog=copied, checkpoint=checkpoint, out=tmp_path / "plain", device="cpu")
    export_bundle(plain)
    given = replace(plain, out=tmp_path / "given", type_parents=parents)
    summary = export_bundle(given)
    assert f"parents of types are from {parents}" in summary_lines(summary, given)
    reasons = [json.loads(line)["reason"] for line in Path(summary.rejects).read_text().splitlines()]
    assert sum(reason.startswith("parents.jsonl: ") for reason in reasons) == 5
    shutil.copyfile(parents, types_path(copied))
    found = replace(plain, out=tmp_path / "found")
    export_bundle(found)

    plain_store, given_store, found_store = ((config.out / STORE_FILE).read_bytes() for config in (plain, given, found))
    assert given_store == found_store != plain_store
    assert "type_parents_sha256" not in Bundle.open(plain.out).manifest.export
    assert Bundle.open(given.out).manifest.export == Bundle.open(found.out).manifest.export
    for config, types, count in ((given, ["idea"], 23), (given, ["matter"], 23), (plain, ["idea"], 0)):
        with Bundle.open(config.out).store() as store:
            assert np.count_nonzero(store.select(types).allowed_E) == count
    with pytest.raises(UserError, match="made with another type parents"):
        export_bundle(replace(plain, out=given.out, resume=True, type_parents=copied))
    with pytest.raises(CatalogError, match="check --type-parents"):
        export_bundle(replace(given, out=tmp_path / "none", type_parents=tmp_path / "none.jsonl"))
