"""The choice of training icons, on a synthetic package."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.build import Drawing
from demo.icons import LICENCES, plan_icons, render_icons, thing

BODY = '<path fill="currentColor" d="M2 2h20v20H2z"/>'


def _package(folder: Path, sets: dict[str, list[str]], licences: dict[str, str]) -> Path:
    (folder / "json").mkdir(parents=True)
    about = {name: {"license": {"spdx": licences.get(name, "MIT")}} for name in sets}
    (folder / "collections.json").write_text(json.dumps(about))
    for name, icons in sets.items():
        content = {
            "icons": {icon: {"body": "" if icon == "blank" else BODY} for icon in icons},
            "width": 24,
            "height": 24,
        }
        (folder / "json" / f"{name}.json").write_text(json.dumps(content))
    return folder


def _drawing(entity_id: str, icon: str, split: str) -> Drawing:
    return Drawing(entity_id=entity_id, kind="emoji", artist="noto", icon=icon, image="", split=split, role="train")


def _planned(folder: Path, sets: dict[str, list[str]], licences: dict[str, str] | None = None) -> set[tuple[str, str]]:
    drawings = [_drawing("emoji:1", "crown", "test_seen"), _drawing("emoji:2", "ghost", "val_unseen")]
    titles = {"emoji:1": "Crown", "emoji:2": "Friendly spook"}
    planned = plan_icons(_package(folder, sets, licences or {}), drawings, titles)
    assert {drawing.role for drawing in planned} <= {"icon"}
    return {(drawing.entity_id, f"{drawing.artist}:{drawing.icon}") for drawing in planned}


@pytest.mark.parametrize(
    ("name", "shows"),
    [("logo-github-fill", "github"), ("github-16", "github"), ("heart-broken", "heart"), ("outline", "outline")],
)
def test_the_thing_in_a_name(name: str, shows: str) -> None:
    assert thing(name) == shows


def test_a_thing_needs_three_families(tmp_path: Path) -> None:
    sets = {"a": ["bed", "cup"], "a-solid": ["bed"], "b": ["bed-outline", "cup"], "c-line": ["bed"]}
    assert _planned(tmp_path, sets) == {
        ("icon:bed", "a:bed"), ("icon:bed", "a-solid:bed"), ("icon:bed", "b:bed-outline"), ("icon:bed", "c-line:bed"),
    }  # fmt: skip


def test_icons_add_drawings_to_seen_entities_only(tmp_path: Path) -> None:
    names = ["crown", "ghost", "friendly-spook"]
    assert _planned(tmp_path, {"a": names, "b": names, "c": names}) == {
        ("emoji:1", "a:crown"), ("emoji:1", "b:crown"), ("emoji:1", "c:crown"),
    }  # fmt: skip


def test_held_out_artists_and_other_licences_are_excluded(tmp_path: Path) -> None:
    sets = {name: ["bed"] for name in ("a", "b", "c", "emojione-v1", "devicon-plain", "flagpack", "noto", "paid")}
    assert "CC-BY-NC-4.0" not in LICENCES
    planned = _planned(tmp_path, sets, {"paid": "CC-BY-NC-4.0"})
    assert {icon for _, icon in planned} == {"a:bed", "b:bed", "c:bed"}


def test_icons_per_thing_are_limited_and_deterministic(tmp_path: Path) -> None:
    sets = {f"f{family}-{style}": ["bed"] for family in range(4) for style in range(5)}
    planned = _planned(tmp_path / "one", sets)
    assert len(planned) == 10
    assert max(Counter(icon.partition("-")[0] for _, icon in planned).values()) == 3
    assert planned == _planned(tmp_path / "two", sets)


def test_missing_icons_are_rendered_and_blank_ones_have_no_file(tmp_path: Path) -> None:
    package = _package(tmp_path / "package", {name: ["bed", "blank"] for name in "abc"}, {})
    planned = plan_icons(package, [], {})
    render_icons(planned, package, tmp_path)
    assert {drawing.image for drawing in planned if not (tmp_path / drawing.image).exists()} == {
        f"icons/{name}/blank.png" for name in "abc"
    }
    image = np.asarray(Image.open(tmp_path / "icons" / "a" / "bed.png"))
    assert image.shape == (128, 128, 4)
    assert image[64, 64].tolist() == [0, 0, 0, 255]
    (tmp_path / "icons" / "a" / "bed.png").write_bytes(b"kept")
    (tmp_path / "icons" / "b" / "bed.png").unlink()
    render_icons(planned, package, tmp_path)
    assert (tmp_path / "icons" / "a" / "bed.png").read_bytes() == b"kept"
    assert (tmp_path / "icons" / "b" / "bed.png").exists()
