"""`level` in answers: the most specific entity or type that is certain, whatever else a request asks for."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from index.bundle import Bundle
from index.levels import LevelModel
from index.manifest import MANIFEST_FILE, Manifest
from service.cli import recognize
from tests.conftest import FIXTURE_ENTITIES, add_type_parents
from wikiclip import Client, Level

PARENTS = {"animal": ["organism"], "fruit": ["organism"], "flag": ["emblem"], "brand": ["emblem"], "emblem": ["thing"]}
MODEL = LevelModel(slope=6.0, weights=(0.7, 1.0, 2.0, 0.0, -1.5, 0.0))
MAX_SIZE = 7
ADMIN = {"Authorization": "Bearer secret"}


@pytest.fixture(autouse=True)
def _large_types(monkeypatch):
    """A tenth of twelve entities is one."""
    monkeypatch.setattr("index.levels.MAX_SHARE", MAX_SIZE / len(FIXTURE_ENTITIES))


@pytest.fixture
def bundle(small_bundle, tmp_path):
    folder = tmp_path / "levels"
    shutil.copytree(small_bundle, folder)
    add_type_parents(folder, PARENTS)
    manifest = Manifest.read(folder / MANIFEST_FILE)
    calibration = {**manifest.calibration, "level": MODEL.to_dict()}
    manifest.model_copy(update={"calibration": calibration}).write(folder / MANIFEST_FILE)
    return folder


def queries(bundle, count=60):
    """Vectors between two entities: the nearer they are to one, the more certain it is."""
    vectors_ND = np.concatenate(list(Bundle.open(bundle).embeddings())).astype(np.float32)
    rng = np.random.default_rng(4)
    for _ in range(count):
        one, other = rng.choice(len(vectors_ND), 2, replace=False)
        yield (vectors_ND[one] + rng.uniform(0, 1.2) * vectors_ND[other]).tolist()


def ask(service, embedding, **params):
    answer = service.post("/recognize", json={"embedding": embedding}, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def above(types):
    found = set(types)
    for _ in PARENTS:
        found |= {parent for kind in found for parent in PARENTS.get(kind, ())}
    return found


def slow_level(predictions, implied=()):
    """Return kind, id and confidence of the level, from all ten candidates."""
    powers = [math.exp(MODEL.slope * each["score"]) for each in predictions]

    def confidence(members, *, entity):
        share = sum(powers[number] for number in members) / sum(powers)
        odds = math.log(max(share, 1e-4) / max(1 - share, 1e-4))
        return 1 / (1 + math.exp(-(0.7 + odds + 2.0 * predictions[members[0]]["score"] - 1.5 * entity)))

    if (sure := confidence([0], entity=True)) >= 0.9:
        return "entity", predictions[0]["entity_id"], pytest.approx(sure, abs=1e-4)
    found = []
    for kind in set().union(*(above(each["types"]) for each in predictions)) - set(implied):
        size = sum(kind in above(each.types) for each in FIXTURE_ENTITIES)
        sure = confidence([n for n, each in enumerate(predictions) if kind in above(each["types"])], entity=False)
        if size <= MAX_SIZE and sure >= 0.9:
            found.append((size, -sure, kind))
    return ("type", min(found)[2], pytest.approx(-min(found)[1], abs=1e-4)) if found else None


def level_of(answer):
    level = answer["level"]
    return None if level is None else (level["kind"], level["id"], level["confidence"])


def test_the_level_is_that_of_a_loop_and_does_not_depend_on_top_k(bundle, serve):
    kinds = []
    with serve(bundle) as service:
        for embedding in queries(bundle):
            answer = ask(service, embedding, top_k=10, lang="fr")
            expected = slow_level(answer["predictions"])
            assert level_of(answer) == expected
            for top_k in (1, 5, 100):
                assert ask(service, embedding, top_k=top_k, min_score=0.99, lang="fr")["level"] == answer["level"]
            kinds.append(expected and expected[0])
            if kinds[-1] == "entity":
                assert answer["level"]["title"] == answer["predictions"][0]["title"]
    assert {*kinds} == {"entity", "type", None}


def test_under_a_filter_it_is_among_the_filtered_entities_and_says_more_than_the_filter(bundle, serve):
    kinds = set()
    with serve(bundle) as service:
        for embedding in queries(bundle):
            answer = ask(service, embedding, top_k=10, types="emblem")
            assert level_of(answer) == slow_level(answer["predictions"], ("emblem", "thing"))
            kinds.add(level_of(answer) and level_of(answer)[:2])
            assert ask(service, embedding, types="nothing")["level"] is None
    assert ("type", "flag") in kinds


def test_a_live_entity_has_the_ancestors_of_its_types(bundle, serve, tmp_path):
    (vector,) = queries(bundle, 1)
    with serve(bundle, live_dir=tmp_path / "live", admin_token="secret") as service:
        for number in range(9):
            record = {"title": f"Badge {number}", "types": ["brand"], "embedding": vector}
            assert service.put(f"/entities/badge{number}", json=record, headers=ADMIN).status_code == 201
        answer = ask(service, vector, top_k=10)
        assert level_of(answer) == slow_level(answer["predictions"])
        assert level_of(answer)[:2] == ("type", "brand")


def test_the_cache_batch_and_client_have_it_too(bundle, serve, small_images):
    with serve(bundle) as service, Client(str(service.base_url)) as client:
        answered = client.recognize(small_images["Q89"])
        assert isinstance(answered.level, Level)
        assert (answered.level.id, answered.level.title, answered.level.kind) == ("food", "food", "type")
        again = client.recognize(small_images["Q89"])
        assert (again.cached, again.level) == (True, answered.level)
        batch = client.recognize_batch([small_images["Q89"], b"none"])
        assert batch.results[0].level == answered.level


def test_the_command_line_prints_it(bundle, small_images, tmp_path):
    (tmp_path / "apple.png").write_bytes(small_images["Q89"])
    done = CliRunner().invoke(recognize, [str(tmp_path / "apple.png"), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].strip() == "surely: food"


def test_without_a_fit_or_calibration_it_is_null(small_bundle, serve, small_images, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(small_bundle, without)
    Manifest.read(without / MANIFEST_FILE).model_copy(update={"calibration": None}).write(without / MANIFEST_FILE)
    for folder in (small_bundle, without):
        with serve(folder) as service:
            answer = service.post("/recognize", content=small_images["Q89"], headers={"Content-Type": "image/png"})
            assert answer.json()["level"] is None
