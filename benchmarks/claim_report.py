"""What `wikiclip bench claim` has to say: the verdict in words, and a page with where the time goes."""

from __future__ import annotations

from html import escape
from typing import Any

from evaluation.pages import Bar, bar_plot, page, section, table

CLAIM = 100  # times faster, says the paper
# What the paper reports on its own hardware: OVEN Entity validation, ms an image.
PAPER_MS = {"AutoVER 7B": 993, "AutoVER 13B": 1569, "WikiCLIP-L": 14.49}
_PAPER = (
    # method, kind, latency in ms, top-1 on unseen and seen entities, HM
    ("GiT-Large (REW-47M)", "generative", 83.95, 25.1, 36.0, 29.6),
    ("AutoVER 7B", "generative", 993, 21.7, 61.5, 32.1),
    ("AutoVER 13B", "generative", 1569, 24.5, 63.6, 35.6),
    ("CLIP2CLIP", "contrastive", 13.84, 10.5, 12.6, 11.5),
    ("CLIP Fusion", "contrastive", 15.93, 4.8, 33.6, 8.4),
    ("WikiCLIP-S", "contrastive", 14.49, 27.0, 36.8, 31.1),
    ("WikiCLIP-L", "contrastive", 14.49, 28.5, 35.5, 31.6),
)
_SYSTEMS = {"wikiclip": "retrieval", "faithful": "generation, faithful", "optimised": "generation, optimised"}


def verdict(precision: str, ratio: dict[str, float], intervals: dict[str, list[float]]) -> list[str]:
    """The ratios against the claim, in words; an interval that holds the claim tells nothing either way."""
    lines = []
    for mode, times in ratio.items():
        low, high = intervals[mode]
        against = "at least" if low >= CLAIM else "less than" if high < CLAIM else "not to be told apart from"
        lines.append(f"{precision}, {mode}: {times} times ({low} to {high}), {against} the {CLAIM} of the claim")
    return lines


def report(figures: dict[str, Any]) -> str:
    """An HTML page: verdict, ratios, where the time goes in each precision, the knobs, the paper's table beside it."""
    said = "".join(f"<li>{escape(line)}</li>" for line in figures["verdict"])
    bars = [
        Bar(name=f"{mode}, {precision}", value=times, interval=tuple(each["ratio_interval"][mode]))
        for precision, each in figures["precisions"].items()
        for mode, times in each["ratio"].items()
    ]
    parts = [
        section(
            "Verdict",
            f"<p>The claim is that retrieval is {CLAIM} times as fast as generation. Here:</p><ul>{said}</ul>",
            bar_plot(bars, title="How many times faster", x_label="times faster than generation, 95 % interval"),
        )
    ]
    parts += [_precision(name, each, figures["peak_gflops"]) for name, each in figures["precisions"].items()]
    knobs = figures["knobs"] | {f"parameters, {k}": f"{n / 1e6:.0f} M" for k, n in figures["parameters"].items()}
    parts.append(section("Knobs", table(["knob", "value"], [[key, str(value)] for key, value in knobs.items()])))
    paper = [[str(cell) for cell in row] for row in _PAPER]
    told = (
        "Measured by the authors on their GPUs, with an EVA-CLIP-8B of about 7.5 B parameters as the encoder: "
        f"{993 / 14.49:.0f} and {1569 / 14.49:.0f} times."
    )
    header = ["method", "kind", "ms", "unseen", "seen", "HM"]
    parts.append(section("The paper's table", f"<p>{told}</p>", table(header, paper)))
    return page("Retrieval against generation", "\n".join(parts))


def _precision(name: str, each: dict[str, Any], peak_gflops: float) -> str:
    rows, bars, stages = [], [], []
    for key, told in _SYSTEMS.items():
        system = each["systems"][key]
        low, high = system["latency"]["interval"]
        per_second = max(system["images_per_s"].items(), key=lambda item: float(item[1]))
        rows.append(
            [told, f"{system['median_ms']:.1f}", f"{low:.1f} to {high:.1f}", f"{system['cpu_seconds']['median']:.3f}",
             f"{per_second[1]} ({per_second[0]})", str(system.get("tokens", "–"))]
        )  # fmt: skip
        bars += [Bar(name=f"{told}: {stage}", value=taken) for stage, taken in system["stages_ms"].items()]
        total = sum(system["stages_ms"].values())
        stages += [
            [told, stage, f"{taken:.2f}", f"{100 * taken / total:.1f} %"]
            for stage, taken in system["stages_ms"].items()
        ]
    header = ["system", "median, ms", "95 % interval", "CPU s an image", "most images/s", "tokens"]
    done = each["systems"]["optimised"]["gflops"]
    ratios = [
        f"{mode} {times} times ({low} to {high})"
        for mode, times in each["cpu_seconds_ratio"].items()
        for low, high in [each["cpu_seconds_ratio_interval"][mode]]
    ]
    told = (
        f"{each['images']} images. In CPU-seconds an image, which other work on the machine touches less: "
        f"{', '.join(ratios)}. The optimised baseline's matrix products run at {done['image tower']:.0f} GFLOP/s in "
        f"the image tower and {done['prefill']:.0f} in the language model, at {done['a CPU-second']:.0f} GFLOP a "
        f"CPU-second in all; the best large float32 product in this run (16-bit on a GPU) reached {peak_gflops:.0f} "
        "GFLOP/s."
    )
    return section(
        name,
        table(header, rows),
        f"<p>{told}</p>",
        bar_plot(bars, title=f"Where the time goes, {name}", x_label="ms"),
        table(["system", "stage", "ms", "share"], stages),
    )
