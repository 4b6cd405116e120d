"""One, two, three and five photographs of one drawing by a held-out artist: `python -m demo.views`.

Each photograph is made independently, as the photographed queries are. The demo bundle answers for the set as the
service does (`Recognizer.recognize_together`).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from core.files import atomic_write_bytes
from core.runtime import describe_run
from demo.build import PHOTO_PX, build_option, read_drawings
from demo.photograph import take_photographs
from evaluation.metrics import (
    calibration_error,
    percentile_interval,
    ratio_interval,
    reliability,
    share_interval,
)
from index.bundle import Bundle
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import RecognizeOptions
from wikiclip.cli import run

DEMO = Path(__file__).parent
VIEWS = (1, 2, 3, 5)
_SEED = 31
_BINS, _RESAMPLINGS = 10, 500
_BATCH = 32


def photographs(drawings: Sequence[Path], count: int) -> Iterator[list[bytes]]:
    """Yield `count` JPEG files for each drawing."""
    for start in range(0, len(drawings), _BATCH):
        images = [Image.open(path) for path in drawings[start : start + _BATCH]]
        taken = [take_photographs(images, PHOTO_PX, _SEED + start + number * 10**6) for number in range(count)]
        yield from map(list, zip(*taken, strict=True))


def error_interval(confidences: Sequence[float], right: Sequence[bool]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the expected calibration error."""
    rng, confidence_N, right_N = np.random.default_rng(0), np.array(confidences), np.array(right)
    errors = []
    for _ in range(_RESAMPLINGS):
        drawn_N = rng.integers(len(right_N), size=len(right_N))
        errors.append(calibration_error(reliability(confidence_N[drawn_N].tolist(), right_N[drawn_N].tolist(), _BINS)))
    return percentile_interval(np.array(errors))


@click.command()
@build_option
@click.option("--out", type=click.Path(path_type=Path), help="Figures, JSON.")
def main(build: Path, out: Path | None) -> None:
    """Measure top-1 and the calibration error of confidence for several photographs of one drawing."""
    bundle = Bundle.open(DEMO / "bundle")
    drawings = [each for each in read_drawings(build) if each.role == "query" and each.split.startswith("test")]
    right: dict[int, list[bool]] = {views: [] for views in VIEWS}
    confidences: dict[int, list[float]] = {views: [] for views in VIEWS}
    with Recognizer(bundle, Settings(cache="off")) as recognizer:
        taken = photographs([build / each.image for each in drawings], max(VIEWS))
        shown = tqdm(zip(drawings, taken, strict=True), total=len(drawings), unit="drawing", disable=None)
        for drawing, photos in shown:
            for views in VIEWS:
                answer = recognizer.recognize_together(photos[:views], RecognizeOptions(top_k=1))
                [best] = answer.predictions
                right[views].append(best.entity_id == drawing.entity_id)
                confidences[views].append(best.confidence or 0.0)
    figures = {
        str(views): {
            "top_1": 100 * float(np.mean(right[views])),
            "interval": share_interval(sum(right[views]), len(drawings)),
            "ratio": sum(right[views]) / sum(right[1]),
            "ratio_interval": ratio_interval(right[views], right[1], [each.entity_id for each in drawings]),
            "error": calibration_error(reliability(confidences[views], right[views], _BINS)),
            "error_interval": error_interval(confidences[views], right[views]),
        }
        for views in VIEWS
    }
    settings = {"bundle": bundle.name, "drawings": len(drawings)}
    report = json.dumps({**describe_run(settings), "figures": figures}, indent=1)
    click.echo(report)
    if out is not None:
        atomic_write_bytes(out, report.encode())


if __name__ == "__main__":
    run(main, name="python -m demo.views")
