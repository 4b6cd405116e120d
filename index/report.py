"""What a bundle holds, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from index.bundle import Bundle, Verify


def describe(path: Path, verify: Verify) -> dict[str, Any]:
    """Check a bundle with its parts opened, and describe it. Raises `BundleError` as `Bundle.open` does."""
    bundle = Bundle.open(path, verify)
    bundle.index()
    side = bundle.entity_encoder()
    with bundle.store() as store:
        stored_entities = len(store)
    manifest = bundle.manifest
    return {
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "schema_version": manifest.schema_version,
        "verified": verify,
        "model": dict(manifest.model),
        "preprocessing": dict(manifest.preprocessing),
        "embedding_dim": manifest.embedding_dim,
        "patches": manifest.patches,
        "counts": asdict(manifest.counts),
        "stored_entities": stored_entities,
        "calibration": None if bundle.calibration is None else bundle.calibration.to_dict(),
        "image_encoder": asdict(manifest.image_encoder),
        "index": asdict(bundle.index_manifest),
        "entity_side": None if side is None else asdict(side),
        "export": dict(manifest.export),
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "bytes": bundle.index_manifest.bytes + sum(entry.bytes for entry in manifest.files.values()),
        "unlisted_files": bundle.unlisted_files(),
        "created_at": manifest.created_at,
    }


def describe_lines(report: dict[str, Any]) -> list[str]:
    """A description as lines of text."""
    counts, index, parity = report["counts"], report["index"], report["image_encoder"]["parity"]
    preprocessing, calibration = report["preprocessing"], report["calibration"]
    lines = [
        f"bundle       {report['name']}@{report['fingerprint']}  (schema {report['schema_version']}, "
        f"{report['bytes'] / 1e6:.1f} MB, made {report['created_at']})",
        f"entities     {counts['entities']}, {counts['without_image']} without an image, "
        f"{counts['without_text']} without text",
        f"left out     {counts['rejected']} catalog record(s), {counts['images_failed']} image(s)",
        f"embeddings   {counts['embeddings']} of width {report['embedding_dim']}, float16",
        f"encoders     image {report['model'].get('image_encoder')}, text {report['model'].get('text_encoder')}",
        f"images       {preprocessing.get('size_px')} px, {report['patches']} patches",
        f"ONNX parity  {parity_line(parity)}",
        *([f"int8         {int8_line(int8)}"] if (int8 := report["image_encoder"]["int8"]) else []),
        *([f"float16      {parity_line(half)}"] if (half := report["image_encoder"]["float16"]) else []),
        f"index        {index['factory']}, {index['bytes'] / 1e6:.1f} MB ({index['why']})",
        "entity side  none: entities are put with their embedding"
        if report["entity_side"] is None
        else f"entity side  adaptor and {report['entity_side']['text_encoder']}",
        "confidence   not calibrated"
        if calibration is None
        else f"confidence   fitted on {calibration['queries']} queries, {calibration['correct']} of them right, "
        f"{calibration['unknown']} for entities outside; abstains below {calibration['abstain_below']:.2f}",
        "whole        every byte hashed"
        if report["verified"] == "full"
        else "whole        sizes checked, small files hashed (every byte with --verify)",
    ]
    if report["unlisted_files"]:
        lines.append(f"not of it    {', '.join(report['unlisted_files'])}")
    return lines


def int8_line(int8: dict[str, Any]) -> str:
    """What the int8 encoder costs, from the manifest's entry."""
    return (
        f"mean cosine {int8['mean_cosine']:.4f}, least {int8['min_cosine']:.4f}; of {int8['images']} "
        f"{int8['judged_on']} {int8['same_top_1']:.1f} % the same top-1, right {int8['top_1_int8']:.1f} % "
        f"(float {int8['top_1_float']:.1f} %)"
    )


def parity_line(parity: Mapping[str, Any]) -> str:
    """How far an encoder's file is from the original, from its manifest's `parity` or its `float16`."""
    return f"least cosine {parity['min_cosine']:.6f}, greatest difference {parity['max_abs_diff']:.2g}"
