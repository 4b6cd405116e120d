"""The arms of the ablation, and their figures as a Markdown table beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from core.errors import UserError

START, END = "<!-- ablation: written by `make ablation` -->", "<!-- /ablation -->"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row: what an entity shows to the adaptor, and how the adaptor is trained."""

    name: str
    paper: float | None = None  # overall accuracy in percent: InfoSeek, knowledge base of 100 k
    trained: bool = True
    image: bool = True
    text: bool = True
    hard_negatives: str = "none"
    residual: bool = True
    centre: bool = False
    unfamiliar: bool = False  # query images by artists that the image encoder never saw, and by no other

    def key(self) -> dict[str, Any]:
        """What a result depends on: all but how the row is called, and what it is compared with."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "paper")}


ARMS = (
    Arm(name="mean patch token, untrained", trained=False, text=False),
    Arm(name="image only", paper=44.8, text=False),
    Arm(name="text only", paper=50.8, image=False),
    Arm(name="image and text (VGKA)", paper=59.7),
    Arm(name="VGKA, clusters", paper=59.7, hard_negatives="clusters"),
    Arm(name="VGKA, synthesis", paper=58.9, hard_negatives="synthesis"),
    Arm(name="VGKA, both", paper=61.2, hard_negatives="both"),
    Arm(name="VGKA, no residual", residual=False),
    Arm(name="VGKA, centred", centre=True),
    Arm(name="VGKA, unfamiliar artists", unfamiliar=True),
)


def table(figures: dict[str, Any]) -> str:
    """Top-1 in percent, mean over the seeds ± their standard deviation, an arm a line."""
    lines = [
        "| entity side | clean: seen | unseen | HM | photographed: seen | unseen | HM | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    paper = {arm.name: arm.paper for arm in ARMS}
    for name, runs in figures["arms"].items():
        cells = [
            _cell([run[how][part] for run in runs]) for how in ("clean", "photo") for part in ("seen", "unseen", "hm")
        ]
        reported = paper.get(name)
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if reported is None else reported} |")
    settings = figures["settings"]
    lines += [
        "",
        _told(figures["reasons"]),
        "",
        f"{settings['seeds']} seed(s), {settings['epochs']} epoch(s) of {settings['pairs']} pairs in batches of "
        f"{settings['batch_size']}, n-sync {settings['n_sync']}, learning rate {settings['lr']}, width "
        f"{settings['width']}; {figures['hardware']['name']}, {figures['date']}.",
    ]
    return "\n".join(lines)


def _told(why: dict[str, float | None]) -> str:
    """The figures of `demo.ablation_reasons` in words; what could not be measured is left out."""
    found = {
        "of the training drawings": why["training_drawings"],
        "of those by artists that the encoder never saw": why["unfamiliar_drawings"],
        "of the test drawings": why["test_drawings"],
    }
    shares = ", ".join(f"{whose} {share:.1f} %" for whose, share in found.items() if share is not None)
    text = f"The nearest other drawing, without an adaptor, is the right entity's for this share: {shares}."
    nearer = why["text_nearer_than"]
    if nearer is not None:
        text += (
            " The entity that a test drawing is wrongly taken for has a text nearer to the right one's than that of "
            f"{nearer:.1f} % of the catalog (median)."
        )
    return text


def _cell(shares: Sequence[float]) -> str:
    percent = [100 * share for share in shares]
    return f"{mean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")


def fill_in(page: str, text: str) -> str:
    """The page with `text` between the two markers. Raises `UserError` if they are not there."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"the page has no place for the table: two lines, {START} and {END}")
    return f"{before}{START}\n\n{text}\n\n{END}{after}"
