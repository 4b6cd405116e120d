"""The command `wikiclip train`."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(1)
_HALF = click.FloatRange(0, 0.5)
_ABOVE_0 = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0, 1, max_open=True)


@click.command(context_settings={"show_default": True})
@click.option("--catalog", type=PATH, required=True, help="Entity records: JSONL or Parquet.")
@click.option("--pairs", type=PATH, help="Query images and their entities: JSONL.  [default: --catalog-pairs]")
@click.option("--image-encoder", required=True, help="Frozen image tower: photo, tiny, onnx:PATH or hf:ID_OR_PATH.")
@click.option("--text-encoder", required=True, help="Frozen text encoder: minilm or hf:ID_OR_PATH.")
@click.option("--out", type=PATH, required=True, help="Folder of the checkpoint.")
@click.option("--validation", type=PATH, help="Pairs that choose epoch and strength, searched in the whole catalog.")
@click.option(
    "--hold-out", type=_HALF, default=0.2,
    help="Share of the entities to hold out, to choose epoch and strength; not with --validation.",
)  # fmt: skip
@click.option(
    "--adaptor", "kind", type=click.Choice(["vgka", "ridge"]), default="vgka",
    help="ridge: only the regression from texts to images that vgka starts from; takes seconds.",
)  # fmt: skip
@click.option("--image-root", type=PATH, help="Folder of the images.  [default: the folder of the file naming them]")
@click.option(
    "--ovenid2impath", type=click.Path(path_type=Path, dir_okay=False),
    help="OVEN's table of image ids and paths.  [default: in the folder of the pairs or the image root]",
)  # fmt: skip
@click.option("--images", type=PATH, help="Folder of `wikiclip fetch-images`, for images by URL.  [default: none]")
@click.option(
    "--max-entities", type=_COUNT,
    help="Entities with an image to draw at random from the catalog, added to those of the pairs.  [default: all]",
)  # fmt: skip
@click.option("--max-per-entity", type=_COUNT, help="Most pairs per entity, drawn at random.  [default: no limit]")
@click.option(
    "--catalog-pairs",
    is_flag=True,
    help="Add pairs from the catalog: entity images as query images, changed where an entity has only one.",
)
@click.option("--epochs", type=_COUNT, default=20, help="Passes over the pairs.")
@click.option(
    "--patience", type=click.IntRange(0), default=3,
    help="Epochs without a better accuracy in validation, after which training stops; 0: never.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(2), default=256, help="Pairs in a batch, per process.")
@click.option("--accumulate", type=_COUNT, default=1, help="Batches per optimiser step.")
@click.option("--lr", type=click.FloatRange(0, 1, min_open=True), default=5e-4, help="Peak learning rate of AdamW.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.05, help="Weight decay of AdamW.")
@click.option("--warmup", type=_SHARE, default=0.05, help="Share of all steps in which the learning rate rises.")
@click.option("--modality-dropout", type=_HALF, default=0.1, help="Probability of hiding an image, or a text.")
@click.option("--text-mask", type=_SHARE, default=0.0, help="Probability of hiding a text token.")
@click.option(
    "--hard-negatives", type=click.Choice(["none", "clusters", "synthesis", "both"]), default="none",
    help="Batches of similar query images, synthetic negatives (an image with another entity's text), or both.",
)  # fmt: skip
@click.option("--n-sync", type=_COUNT, default=8, help="Synthetic negatives per image.")
@click.option(
    "--synthetic-image", type=click.Choice(["own", "other"]), default="own",
    help="Image of synthetic negatives: that of the query's own entity, or those of the other entities of the batch.",
)  # fmt: skip
@click.option("--cluster-size", type=int, help="Similar query images per batch.  [default: the whole batch]")
@click.option("--hard-negatives-from", type=_COUNT, default=1, help="First epoch with hard negatives.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of initial weights, order and dropout.")
@click.option("--width", type=_COUNT, default=256, help="Channels inside the adaptor.")
@click.option("--layers", type=_COUNT, default=2, help="Decoder layers of the adaptor.")
@click.option("--heads", type=_COUNT, default=8, help="Attention heads of the adaptor.")
@click.option("--ffn-ratio", type=_ABOVE_0, default=4.0, help="Width inside the feed-forward network, as a multiple.")
@click.option("--norm", type=click.Choice(["pre", "post"]), default="pre", help="Where the layers normalise.")
@click.option("--self-attention/--no-self-attention", default=False, help="Attention among the patches in each layer.")
@click.option("--dropout", type=_SHARE, default=0.1, help="Dropout in the adaptor.")
@click.option("--residual/--no-residual", default=True, help="Add the image embedding and the ridge's prediction.")
@click.option("--centre/--no-centre", default=False, help="Subtract the mean query embedding from both sides.")
@click.option("--max-tokens", default=256, help="Tokens read from each text.")
@click.option("--text-layer", type=int, help="Hidden layer of the text encoder; -1 is the last.  [default: its output]")
@click.option("--half/--no-half", default=True, help="Store weights in float16 if that changes no embedding.")
@click.option("--resume", is_flag=True, help="Resume from the snapshot of an interrupted run, if there is one.")
@click.option("--snapshot-every", type=click.IntRange(0), default=500, help="Steps between snapshots; 0 for none.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--cache-dir", type=PATH, help="Folder of cached features.  [default: in the user's cache folder]")
@click.option("--smoke", is_flag=True, help="Try the same run on a few small batches; writes OUT.smoke.")
@click.option("--revision", help="Branch, tag or commit of the one hf: encoder given; or write hf:ID@REVISION.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with an hf: model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def train(as_json: bool, smoke: bool, cache_dir: Path | None, revision: str | None, **options: Any) -> None:
    """Train the adaptor on pairs of query image and entity.

    Both encoders are frozen. Their features are computed once and cached. Bad records go to rejected.jsonl and the
    run's log to NAME.train.jsonl, both next to the checkpoint. On several GPUs, use
    torchrun --nproc-per-node N -m wikiclip train ...
    """
    from model.adaptor import AdaptorConfig
    from model.encoders import with_revision
    from model.feature_cache import default_cache_root
    from model.run import TrainRequest, run_training
    from model.trainer import TrainSettings

    specs = ("image_encoder", "text_encoder")
    options |= zip(specs, with_revision(revision, *map(options.get, specs)), strict=True)
    if options.pop("kind") == "ridge":
        options["layers"] = 0
    settings = {field.name: options.pop(field.name) for field in fields(TrainSettings)}
    adaptor = {field.name: options.pop(field.name) for field in fields(AdaptorConfig) if field.name in options}
    request = TrainRequest(
        settings=TrainSettings(**settings),
        adaptor={**adaptor, "start": "image"},
        cache_dir=cache_dir or default_cache_root(),
        **options,
    )
    if smoke:
        request = request.smoke()
    report = run_training(request)
    if report is None:  # the first process reports
        return
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo("{checkpoint}: {pairs} pairs, {entities} entities, {parameters:,} parameters".format_map(report))
    loss = "" if report["loss"] is None else f"loss {report['loss']:.4f} after {report['steps']} steps, "
    click.echo(loss + "{seconds:.0f} s; weights {weights}".format_map(report))
    _print_choices(report)
    if report["rejected"]:
        click.echo(f"{report['rejected']} record(s) rejected, see {request.out.parent / 'rejected.jsonl'}")


def _print_choices(report: dict[str, Any]) -> None:
    """Print the text share, the curve, and the epoch and strength that were chosen."""
    if (ridge := report["ridge"]) and ridge["accuracy"]:
        click.echo(
            f"ridge regression: text share {ridge['text_share']}, in cross-validation {_accuracy(ridge['accuracy'])}; "
            f"without text {_accuracy(ridge['without'])}"
        )
    if not report["validation"]:
        click.echo("nothing was held out, so the last epoch was kept")
        return
    for row in report["curve"]:
        click.echo(f"epoch {row['epoch']:>3}, strength {row['strength']:.2f}: {_accuracy(row)}")
    if report["best_epoch"]:
        why = "the best harmonic mean of seen and unseen, and better than the start by three standard errors"
        what = f"epoch {report['best_epoch']} at strength {report['strength']:.2f}"
    else:
        what, why = "the start", "no epoch was better by three standard errors"
    click.echo(f"kept {what}: {why} ({report['held_out']} entities held out)")


def _accuracy(row: dict[str, Any]) -> str:
    """Return the accuracies in percent. Without a seen and an unseen split, that is top-1."""
    names = ("seen", "unseen", "hm") if row["hm"] is not None else ("top1",)
    return ", ".join(f"{name} {100 * row[name]:.1f} %" for name in names)
