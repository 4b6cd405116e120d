"""The page in a real browser, against a real service."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from index.bundle import Bundle

HERE = Path(__file__).resolve().parent
EXPECTED_REFUSALS = {"undecodable": 422, "not_an_image": 415}


def see(browsed: dict[str, dict[str, Any]], name: str) -> Any:
    """Return the findings of a scenario. Fails with the browser's error if the scenario did not finish."""
    seen = browsed[name]
    assert "failure" not in seen, seen["failure"]
    return seen["result"]


def titles(predictions: list[dict[str, Any]]) -> list[str]:
    return [prediction["title"] for prediction in predictions]


def confidence_in_words(confidence: float) -> str:
    rounded = round(confidence * 100)
    return "> 99 % sure" if rounded > 99 else "< 1 % sure" if rounded < 1 else f"{rounded} % sure"


def test_the_bundle_is_shown(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "first_look")
    assert " ".join(seen["bundle"].split()) == "small 12 entities"
    assert seen["drawing"] is False, "drawings are for the tiny encoder"
    assert seen["heat_map"] is True
    assert seen["hint_gap"] >= 10
    assert seen["unnamed"] == [], "every control has an accessible name"


def test_examples_are_pictures_of_the_catalog(browsed: dict[str, dict[str, Any]], small_bundle: Path) -> None:
    with Bundle.open(small_bundle).store() as store:
        entities = store.by_rows(range(len(store)))
    thumbnails = {entity.title for entity in entities if entity.has_thumbnail}
    symbols = {entity.title for entity in entities if entity.symbol is not None}
    examples = see(browsed, "first_look")["examples"]
    assert thumbnails < set(examples) <= thumbnails | symbols
    assert titles(see(browsed, "example")["shown"]["predictions"])[0] == "Orange"


def test_a_dropped_file_shows_predictions(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "dropped")
    answer, shown = seen["body"], seen["shown"]
    best = shown["predictions"][0]
    assert (best["title"], best["tile_text"], best["types"]) == ("Giraffe", "🦒", ["animal"])
    assert best["score"] == pytest.approx(1, abs=0.01)
    assert titles(shown["predictions"]) == titles(answer["predictions"])
    assert len(shown["predictions"]) == 5
    for line, prediction in zip(shown["predictions"], answer["predictions"], strict=True):
        assert line["entity_id"] == prediction["entity_id"]
        assert line["score"] == pytest.approx(prediction["score"], abs=0.001)
        assert line["confidence"] == confidence_in_words(prediction["confidence"])
    assert (shown["abstained"], shown["level"]) == (False, None)
    assert shown["problem"] is None
    assert "Best match: Giraffe" in shown["status"]


def test_several_files_are_asked_about_once(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "several")
    answer = seen["several"]["body"]
    assert [each["index"] for each in answer["skipped"]] == [0]
    assert titles(seen["shown"]["predictions"]) == titles(answer["predictions"])
    assert seen["hint"] == "2 photographs of one thing. Cannot be read: broken.jpg."
    assert seen["hint"] in seen["shown"]["status"]
    assert seen["region"] is True
    assert seen["chosen"]["body"]["skipped"] == []
    assert seen["chosenHint"] == "2 photographs of one thing."
    assert "You chose 9 files. The service takes up to 8 of one thing." in seen["tooMany"]["problem"]
    assert "skipped" not in seen["single"]["body"]
    assert seen["chosen"]["body"]["predictions"] == seen["single"]["body"]["predictions"]


def test_timings_are_shown(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "dropped")
    stages = [re.match(r"[a-z]+", entry) for entry in seen["shown"]["stages"]]
    assert [stage[0] for stage in stages if stage][:4] == ["decode", "queue", "encode", "search"]
    assert re.search(r"[\d.]+ ms in the service, [\d.]+ ms including the network", seen["shown"]["times"])
    assert seen["body"]["bundle"] in seen["shown"]["provenance"]
    assert seen["body"]["model"] in seen["shown"]["provenance"]


def test_the_heat_map_covers_the_image(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "explained")
    for number, shown in enumerate((seen["first"], seen["second"])):
        heat_map = seen["body"]["predictions"][number]["explanation"]["heat_map"]
        values = [value for row in heat_map for value in row]
        assert (shown["hidden"], shown["marked"], shown["grid"]) == (False, number, [4, 4])
        assert shown["alphas"].index(max(shown["alphas"])) == values.index(max(values))
        mean = sum(values) / len(values)
        assert all(alpha == 0 for alpha, value in zip(shown["alphas"], values, strict=True) if value < mean)
        assert shown["legend"] == f"less more like {seen['body']['predictions'][number]['title']}"
    # The image has 48 x 40 pixels, of which the encoder sees the central square.
    assert seen["first"]["share"] == pytest.approx([40 / 48, 40 / 48], abs=0.01)
    assert seen["off"]["hidden"] is True


def test_what_was_found_is_boxed_and_listed(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "found")
    assert seen["real"]["parameters"]["regions"] == "auto"
    assert isinstance(seen["real"]["body"]["regions"], list)
    assert seen["first"]["heading"] == "Things in the image"
    assert seen["first"]["titles"] == [region["predictions"][0]["title"] for region in seen["regions"]]
    assert seen["first"]["whole"] == 5
    assert [box["text"] for box in seen["first"]["boxes"]] == ["1", "2"]
    share = 40 / 48  # of the square stage's height that the image covers
    for box, region in zip(seen["first"]["boxes"], seen["regions"], strict=True):
        x, y, width, height = region["box"]
        expected = (x, (1 - share) / 2 + y * share, width, height * share)
        assert (box["x"], box["y"], box["width"], box["height"]) == pytest.approx(expected, abs=0.02)
    assert seen["marked"] == [False, True]
    assert "regions" not in seen["off"]["parameters"]
    assert (seen["off"]["boxes"], seen["off"]["titles"]) == ([], [])


def test_an_abstention_shows_no_confidence(browsed: dict[str, dict[str, Any]]) -> None:
    shown = see(browsed, "abstained")["shown"]
    assert (shown["abstained"], shown["level"]) == (True, "Surely: animal")
    assert titles(shown["predictions"])[0] == "Giraffe"
    assert {line["confidence"] for line in shown["predictions"]} == {None}


def test_a_pasted_image_shows_predictions(browsed: dict[str, dict[str, Any]]) -> None:
    assert titles(see(browsed, "pasted")["shown"]["predictions"])[0] == "Giraffe"


def test_the_second_answer_is_marked_cached(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "picked_twice")
    assert seen["second"]["cached"] is True
    assert seen["shown"]["cached"] is True
    assert titles(seen["shown"]["predictions"])[0] == "Lion"


def test_a_tile_is_a_thumbnail_a_symbol_or_a_monogram(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "every_thumbnail")
    tiles = {line["entity_id"]: line["tile"] for line in seen["shown"]["predictions"]}
    assert len(tiles) == 12
    for prediction in seen["body"]["predictions"]:
        expected = (
            "thumbnail" if prediction["has_thumbnail"] else "symbol" if prediction["symbol"] is not None else "monogram"
        )
        assert tiles[prediction["entity_id"]] == expected, prediction["entity_id"]
    assert set(tiles.values()) == {"thumbnail", "symbol", "monogram"}


def test_a_drawing_is_recognized_and_undone(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "drawn")
    white = [255, 255, 255, 255]
    assert seen["status"] == 200
    assert len(seen["predictions"]) == 5
    red, blue = seen["middle"], seen["covered"]
    assert red[0] > 180
    assert red[2] < 100
    assert blue[2] > 150
    assert blue[0] < 100
    assert seen["undone"] == red
    assert seen["cleared"] == white
    assert seen["can_undo"] is False
    assert seen["focused"] == "board", "the button that had the focus is disabled"
    assert seen["heat_map"] is False, "this encoder has no heat maps"


def test_drawing_works_by_keyboard(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "drawn_by_keyboard")
    assert seen["status"] == 200
    assert seen["predictions"] == 5
    assert max(seen["trail"][:3]) < 100, "a black line to the right of the middle"


def test_a_region_is_sent_as_a_box(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "region")
    x, y, w, h = map(float, seen["dragged"]["box"].split(","))
    assert x == pytest.approx(0.25, abs=0.02)
    assert w == pytest.approx(0.5, abs=0.02)
    # The image has 48 x 40 pixels and is fitted into a square: its height is 5/6 of it, from 1/12 to 11/12.
    assert y == pytest.approx((0.25 - 1 / 12) * 6 / 5, abs=0.02)
    assert h == pytest.approx(0.25 * 6 / 5, abs=0.02)
    nudged = [float(side) for side in seen["nudged"]["box"].split(",")]
    assert nudged == pytest.approx([x, y + 0.02, w, h], abs=0.001)
    assert "box" not in seen["whole"]
    assert seen["back"] == "mark-region", "the region that had the focus is gone"
    assert seen["marked"]["box"] == "0.2500,0.2500,0.5000,0.5000"
    assert seen["widened"]["box"] == "0.2300,0.2500,0.5200,0.5000"
    resized = [float(side) for side in seen["resized"]["box"].split(",")]
    assert resized == pytest.approx([0.23, 0.25, 0.27, 0.25], abs=0.02)


def test_predictions_can_be_filtered(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "narrowed")
    assert len(seen["three"]) == 3
    assert titles(seen["three"])[0] == "Apple"
    assert sorted(titles(seen["fruit"])) == ["Apple", "Banana", "Orange"]
    assert seen["kept"] == "fruit", "the chip that was pressed is new, but has the focus"
    assert seen["none"]["predictions"] == []
    assert seen["none"]["problem"] is None


def test_catalog_search(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "searched")
    assert sorted(seen["lion"]["titles"]) == ["Lion", "Lion of Lucerne"]
    assert (seen["nothing"]["titles"], seen["nothing"]["note"]) == ([], "No title matches “qqqq”.")
    assert seen["lion"]["found_as"] == []
    assert (seen["girafe"]["titles"], seen["girafe"]["found_as"]) == (["Giraffe"], ["Found as Girafe (French)"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("undecodable", "broken.jpg is damaged or not an image. Choose a JPEG, PNG"),
        ("not_an_image", "note.txt is not an image. Choose a JPEG, PNG"),
    ],
)
def test_a_refusal_is_explained(browsed: dict[str, dict[str, Any]], name: str, said: str) -> None:
    seen = see(browsed, name)
    problem = seen["refused"]["body"]
    assert seen["refused"]["status"] == EXPECTED_REFUSALS[name]
    assert said in seen["seen"]["problem"]
    assert problem["detail"] not in seen["seen"]["problem"]
    assert problem["request_id"] in seen["seen"]["problem"]
    assert seen["seen"]["predictions"] == []


def test_a_file_that_is_too_large_is_not_sent(browsed: dict[str, dict[str, Any]]) -> None:
    problem = see(browsed, "too_large")["problem"]
    assert re.search(r"large\.png has [\d.]+ MB\. The service takes up to", problem)
    assert "Try again" not in problem


def test_an_image_dragged_from_a_page_is_recognized_or_the_page_says_why_not(
    browsed: dict[str, dict[str, Any]],
) -> None:
    seen = see(browsed, "dragged_from_a_page")
    assert "does not let this page read images of elsewhere.example. Copy the image" in seen["elsewhere"]["problem"]
    assert "Try again" not in seen["elsewhere"]["problem"]
    assert titles(seen["embedded"]["predictions"])[0] == "Giraffe"
    assert seen["embedded"]["problem"] is None


def test_the_next_image_after_a_refusal_is_recognized(browsed: dict[str, dict[str, Any]]) -> None:
    after = see(browsed, "undecodable")["after"]
    assert after["problem"] is None
    assert titles(after["predictions"])[0] == "Giraffe"


def test_the_page_fits_a_narrow_screen(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "narrow")
    assert all(overflow_px <= 0 for overflow_px in seen["overflows"])
    heat, image = seen["centres"]
    assert heat == pytest.approx(image, abs=2)


def test_the_layout_does_not_shift(browsed: dict[str, dict[str, Any]]) -> None:
    # Browsers rate 0.1 as good. A stage or list without reserved space causes several hundredths.
    assert see(browsed, "steady")["shift"] < 0.01


def test_light_and_dark_schemes(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "schemes")
    light, dark, chosen_tab, tabs = (
        sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (seen["light"], seen["dark"], *seen["tabs"])
    )
    assert light > 600
    assert dark < 150
    assert chosen_tab > tabs + 300, "the chosen tab is visible in the dark scheme too"


def test_the_documentation_lists_problems_and_tries_requests(browsed: dict[str, dict[str, Any]]) -> None:
    seen = see(browsed, "documented")
    assert seen["problem"] == "/docs#problem-bad-parameter"
    assert seen["status"] == 200
    assert titles(seen["body"]["predictions"])[0] == "Giraffe"


def test_the_console_has_no_errors(browsed: dict[str, dict[str, Any]]) -> None:
    for name, seen in browsed.items():
        # Browsers log every refused request. The expected ones are not errors of the page.
        refused = f"the server responded with a status of {EXPECTED_REFUSALS.get(name)} "
        assert [line for line in seen["console"] if refused not in line] == [], name


def test_no_request_leaves_the_origin(browsed: dict[str, dict[str, Any]]) -> None:
    assert {name: seen["elsewhere"] for name, seen in browsed.items() if seen["elsewhere"]} == {}


def test_the_policy_allows_only_the_service_itself(browsed: dict[str, dict[str, Any]]) -> None:
    policy = browsed["first_look"]["headers"]["content-security-policy"]
    directives = dict(directive.strip().partition(" ")[::2] for directive in policy.split(";") if directive.strip())
    assert directives["default-src"] in {"'self'", "'none'"}
    assert directives.get("script-src", "'self'") == directives.get("style-src", "'self'") == "'self'"
    assert set(directives["img-src"].split()) == {"'self'", "blob:", "data:"}
    assert "unsafe" not in policy
    assert "http" not in policy


def test_files_are_served_with_their_types(service_url: str) -> None:
    for name, media_type in (("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        response = httpx.get(f"{service_url}/page/{name}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(media_type)


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    for name, package in packages.items():
        assert "resolved" not in package, name
        assert package["integrity"].startswith("sha512-"), name


def test_missing_chromium_fails_in_one_clear_line(
    find_chromium: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(pytest.fail.Exception, match=r"^no Chromium: install chromium .*CHROMIUM$"):
        find_chromium()
