"""Write the table of figures in README.md: `make figures`.

Accuracy comes from demo/accuracy.json, which `make demo-bundle` writes. Speed comes from docs/figures/NAME.json, the
output of `wikiclip bench NAME --json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", flags=re.DOTALL)


def table() -> str:
    """Return the Markdown table."""
    accuracy = _read("demo/accuracy.json")
    claim, peers, index = (_read(f"docs/figures/{name}.json") for name in ("claim", "peers", "index"))
    ratio, interval = (claim["precisions"]["float32"][key] for key in ("ratio", "ratio_interval"))
    int8 = claim["precisions"]["int8"]["ratio"]
    rows = [
        ("what", "figure", "command"),
        ("---", "---", "---"),
        ("drawings: seen, unseen, harmonic mean", _top1(accuracy["clean"]), "`make demo-bundle`"),
        ("photographed drawings: seen, unseen, harmonic mean", _top1(accuracy["photo"]), "`make demo-bundle`"),
        (
            "entities absent from the catalog: AUROC on drawings, photographed",
            f"{accuracy['clean_left_out']['auroc']:.2f}, {accuracy['photo_left_out']['auroc']:.2f}",
            "`make demo-bundle`",
        ),
        (
            "one image, retrieval against generation as AutoVER runs it, float32",
            f"{ratio['faithful']:.0f} times as fast ({interval['faithful'][0]:.0f} to {interval['faithful'][1]:.0f})",
            "`wikiclip bench claim`",
        ),
        (
            "the same against an optimised generative baseline; both in int8",
            f"{ratio['optimised']:.0f} times as fast; {int8['optimised']:.0f}",
            "`wikiclip bench claim`",
        ),
        (
            "images per second against the best of LitServe, mosec and BentoML; with our decoder in theirs",
            f"{peers['ratios']['its own decoder']['throughput']:.2f} times; "
            f"{peers['ratios']['our decoder']['throughput']:.2f}",
            "`wikiclip bench peers`",
        ),
        _index_row(index),
    ]
    hardware = claim["hardware"]
    machine = f"Speed: {hardware['cpu']}, {hardware['cores']} cores, no GPU, commit `{claim['commit']}`."
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{machine}\n\n"


def _read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _top1(accuracy: dict[str, Any]) -> str:
    return " / ".join(f"{accuracy[key]:.1f}" for key in ("seen", "unseen", "hm")) + " %"


def _index_row(index: dict[str, Any]) -> tuple[str, str, str]:
    largest = index["made_up"]["sizes"][-1]
    return (
        f"search over {largest['vectors']:,} embeddings of width {index['made_up']['dim']}, one thread: "
        "median, recall@10 against exact search, memory besides mapped files",
        f"{largest['single']['p50_ms']:.1f} ms, {largest['recall_at_10']:.3f}, "
        f"{largest['memory_mb']['own'] / 1000:.1f} GB",
        f"`{index['command']}`",
    )


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")
