"""`wikiclip train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.option("--catalog", type=click.Path(path_type=Path), required=True, help="Entity records: JSONL or Parquet.")
@click.option("--pairs", type=click.Path(path_type=Path), required=True, help="Query images and their entities: JSONL.")
@click.option("--image-encoder", required=True, help="Frozen image tower: tiny, onnx:PATH or hf:ID_OR_PATH.")
@click.option("--text-encoder", required=True, help="Frozen text encoder: minilm or hf:ID_OR_PATH.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint.")
@click.option(
    "--validation", type=click.Path(path_type=Path), help="Pairs to choose the best epoch by, over the catalog."
)
@click.option("--image-root", type=click.Path(path_type=Path), help="Folder of the images, if not beside their files.")
@click.option("--epochs", default=20, help="Passes over the pairs.")
@click.option("--batch-size", default=256, help="Pairs in a batch; the negatives come from it.")
@click.option("--lr", default=5e-4, help="Highest learning rate of AdamW.")
@click.option("--weight-decay", default=0.05, help="Weight decay of AdamW.")
@click.option("--warmup", default=0.05, help="Share of all steps in which the learning rate rises, from 0 to 1.")
@click.option("--modality-dropout", default=0.1, help="Chance of hiding an image, and of hiding a text, from 0 to 0.5.")
@click.option("--seed", default=0, help="Seed of initial weights, order and dropout.")
@click.option("--width", default=256, help="Channels inside the adaptor.")
@click.option("--layers", default=2, help="Decoder layers of the adaptor.")
@click.option("--heads", default=8, help="Attention heads of the adaptor.")
@click.option("--ffn-ratio", default=4.0, help="Hidden width of the feed-forward network, as a multiple of the width.")
@click.option("--norm", type=click.Choice(["pre", "post"]), default="pre", help="Where the layers normalise.")
@click.option("--self-attention/--no-self-attention", default=False, help="Attention among the patches in each layer.")
@click.option("--dropout", default=0.1, help="Dropout in the adaptor, from 0 to 1.")
@click.option("--residual/--no-residual", default=True, help="Add the mean patch token to the adaptor's output.")
@click.option("--max-tokens", default=256, help="Tokens of a text that are read.")
@click.option(
    "--text-layer", type=int, help="Hidden layer of the text encoder to read; -1 is the last. [default: its output]"
)
@click.option("--half/--no-half", default=True, help="Store weights in float16 where that changes no embedding.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Folder of frozen features. [default: the user's cache]"
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with an hf: model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def train(as_json: bool, cache_dir: Path | None, **options: Any) -> None:
    """Train the adaptor on pairs of query image and entity.

    Both encoders stay frozen and their features are computed once and cached. Bad records are counted in rejected.jsonl
    beside the checkpoint; the log of the run is beside it, too.
    """
    from model.feature_cache import default_cache_root
    from model.run import TrainRequest, run_training
    from model.train import TrainSettings

    settings = _take(options, "epochs", "batch_size", "lr", "weight_decay", "warmup", "modality_dropout", "seed")
    adaptor = _take(options, "width", "layers", "heads", "ffn_ratio", "norm", "self_attention", "dropout", "residual")
    request = TrainRequest(
        settings=TrainSettings(**settings), adaptor=adaptor, cache_dir=cache_dir or default_cache_root(), **options
    )
    report = run_training(request)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    click.echo(
        f"{report.checkpoint}: {report.pairs} pairs, {report.entities} entities, {report.parameters:,} parameters"
    )
    click.echo(f"loss {report.loss:.4f} after {report.steps} steps, {report.seconds:.0f} s; weights {report.weights}")
    if report.validation is not None:
        shown = {name: value for name, value in report.validation.to_dict().items() if value is not None}
        figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shown.items())
        click.echo(f"best epoch {report.best_epoch}: {figures}")
    if report.rejected:
        click.echo(f"{report.rejected} record(s) rejected, see {request.out.parent / 'rejected.jsonl'}")


def _take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names}
