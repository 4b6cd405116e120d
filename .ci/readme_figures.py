"""Update the accuracy figures in README.md from demo/accuracy.json, which `make demo-bundle` writes: `make figures`.

The speed figures in the same table name their command and commit. They are copied from docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def updated(readme: str) -> str:
    """Return the README with the current accuracy figures. Each row must be there once."""
    accuracy = json.loads((ROOT / "demo" / "accuracy.json").read_text(encoding="utf-8"))
    aurocs = ", ".join(f"{accuracy[name]['auroc']:.2f}" for name in ("clean_left_out", "photo_left_out"))
    nothing = accuracy["nothing"]
    rows = {
        "drawings, top-1: seen / unseen / harmonic mean": _top1(accuracy["clean"]),
        "photographed drawings": _top1(accuracy["photo"]),
        "AUROC of entities that are not in the catalog: drawings, photographed": aurocs,
        "images that show nothing: abstained": f"{nothing['abstained']} of {nothing['images']}",
    }
    for what, figure in rows.items():
        row = f"| {what} | {figure} | `make demo-bundle` |"
        readme, count = re.subn(rf"^\| {re.escape(what)} \|.*$", row, readme, flags=re.MULTILINE)
        assert count == 1, what
    return readme


def _top1(accuracy: dict[str, Any]) -> str:
    return " / ".join(f"{accuracy[key]:.1f}" for key in ("seen", "unseen", "hm")) + " %"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
