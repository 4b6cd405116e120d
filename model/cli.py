"""`wikiclip train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.option("--catalog", type=click.Path(path_type=Path), required=True, help="Entity records: JSONL or Parquet.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Query images and their entities: JSONL. [default: --catalog-pairs]",
)
@click.option("--image-encoder", required=True, help="Frozen image tower: tiny, onnx:PATH or hf:ID_OR_PATH.")
@click.option("--text-encoder", required=True, help="Frozen text encoder: minilm or hf:ID_OR_PATH.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint.")
@click.option(
    "--validation", type=click.Path(path_type=Path), help="Pairs to choose the best epoch by, over the catalog."
)
@click.option("--image-root", type=click.Path(path_type=Path), help="Folder of the images, if not beside their files.")
@click.option(
    "--ovenid2impath", type=click.Path(path_type=Path, dir_okay=False),
    help="OVEN's table of image ids and paths. [default: beside the pairs, or in the image root]",
)  # fmt: skip
@click.option(
    "--max-per-entity", type=int, help="Pairs of an entity to keep at most, drawn by the seed. [default: all]"
)
@click.option(
    "--catalog-pairs", is_flag=True, help="Add pairs from the catalog: an entity's own images as query images."
)
@click.option("--epochs", default=20, help="Passes over the pairs.")
@click.option("--batch-size", default=256, help="Pairs in a batch, in each process; the negatives come from it.")
@click.option("--accumulate", default=1, help="Batches whose gradients make one step of the optimiser.")
@click.option("--lr", default=5e-4, help="Highest learning rate of AdamW.")
@click.option("--weight-decay", default=0.05, help="Weight decay of AdamW.")
@click.option("--warmup", default=0.05, help="Share of all steps in which the learning rate rises, from 0 to 1.")
@click.option("--modality-dropout", default=0.1, help="Chance of hiding an image, and of hiding a text, from 0 to 0.5.")
@click.option("--text-mask", default=0.0, help="Chance of hiding a token of a text, from 0 to 1.")
@click.option(
    "--hard-negatives", type=click.Choice(["none", "clusters", "synthesis", "both"]), default="none",
    help="Batches of query images that look alike, images read with another entity's text, or both.",
)  # fmt: skip
@click.option("--n-sync", default=8, help="Texts that each image is read with for synthetic negatives.")
@click.option("--cluster-size", type=int, help="Query images that look alike in a batch. [default: the whole batch]")
@click.option("--hard-negatives-from", default=1, help="Epoch with which hard negatives start.")
@click.option("--seed", default=0, help="Seed of initial weights, order and dropout.")
@click.option("--width", default=256, help="Channels inside the adaptor.")
@click.option("--layers", default=2, help="Decoder layers of the adaptor.")
@click.option("--heads", default=8, help="Attention heads of the adaptor.")
@click.option("--ffn-ratio", default=4.0, help="Hidden width of the feed-forward network, as a multiple of the width.")
@click.option("--norm", type=click.Choice(["pre", "post"]), default="pre", help="Where the layers normalise.")
@click.option("--self-attention/--no-self-attention", default=False, help="Attention among the patches in each layer.")
@click.option("--dropout", default=0.1, help="Dropout in the adaptor, from 0 to 1.")
@click.option("--residual/--no-residual", default=True, help="Add the mean patch token to the adaptor's output.")
@click.option(
    "--centre/--no-centre", default=False, help="Take the mean query embedding off both queries and entities."
)
@click.option("--max-tokens", default=256, help="Tokens of a text that are read.")
@click.option(
    "--text-layer", type=int, help="Hidden layer of the text encoder to read; -1 is the last. [default: its output]"
)
@click.option("--half/--no-half", default=True, help="Store weights in float16 where that changes no embedding.")
@click.option("--resume", is_flag=True, help="Go on from the snapshot of a run that was cut off, if there is one.")
@click.option("--snapshot-every", default=500, help="Steps between snapshots, which --resume needs; 0 for none.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Folder of frozen features. [default: the user's cache]"
)
@click.option("--smoke", is_flag=True, help="The same path on a few small batches, into OUT.smoke: does it work here?")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with an hf: model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def train(as_json: bool, smoke: bool, cache_dir: Path | None, **options: Any) -> None:
    """Train the adaptor on pairs of query image and entity.

    Both encoders stay frozen and their features are computed once and cached. Bad records are counted in rejected.jsonl
    beside the checkpoint; the log of the run is beside it, too. On several GPUs:
    torchrun --nproc-per-node N -m wikiclip train ...
    """
    from model.feature_cache import default_cache_root
    from model.run import TrainRequest, run_training
    from model.train_settings import TrainSettings

    settings = _take(
        options, "epochs", "batch_size", "accumulate", "lr", "weight_decay", "warmup", "modality_dropout", "text_mask",
        "hard_negatives", "n_sync", "cluster_size", "hard_negatives_from", "seed",
    )  # fmt: skip
    adaptor = _take(
        options, "width", "layers", "heads", "ffn_ratio", "norm", "self_attention", "dropout", "residual", "centre"
    )
    request = TrainRequest(
        settings=TrainSettings(**settings), adaptor=adaptor, cache_dir=cache_dir or default_cache_root(), **options
    )
    if smoke:
        request = request.smoke()
    report = run_training(request)
    if report is None:  # of several processes, the first one reports
        return
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
