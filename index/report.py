"""What `wikiclip inspect` reports about a bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from index.bundle import Bundle, Verify
from index.manifest import SelfCheck


def describe(path: Path, verify: Verify) -> dict[str, Any]:
    """Check a bundle, open its parts and describe it. Raise `BundleError` as `Bundle.open` does."""
    bundle = Bundle.open(path, verify)
    bundle.index()
    entity_encoder = bundle.entity_encoder()
    with bundle.store() as store:
        stored_entities = len(store)
    manifest = bundle.manifest
    return {
        **manifest.model_dump(),
        "fingerprint": bundle.fingerprint,
        "verified": verify,
        "stored_entities": stored_entities,
        "calibration": None if bundle.calibration is None else bundle.calibration.to_dict(),
        "image_encoder": {"int8": None, "float16": None, **manifest.image_encoder.model_dump()},
        "index": bundle.index_manifest.model_dump(),
        "images_only": manifest.images_only,
        "pooling": manifest.pooling,
        "remembered": manifest.remembered and manifest.remembered.model_dump(),
        "entity_side": None if entity_encoder is None else entity_encoder.model_dump(),
        "bytes": bundle.index_manifest.bytes + sum(entry.bytes for entry in manifest.files.values()),
        "unlisted_files": bundle.unlisted_files(),
    }


def describe_lines(report: dict[str, Any]) -> list[str]:
    """Return a description as lines of text."""
    counts, index, encoder = report["counts"], report["index"], report["image_encoder"]
    lines = {
        "bundle": f"{report['name']}@{report['fingerprint']}  (schema {report['schema_version']}, "
        f"{report['bytes'] / 1e6:.1f} MB, made {report['created_at']})",
        "entities": f"{counts['entities']}, {counts['without_image']} without an image, "
        f"{counts['without_text']} without text",
        "left out": f"{counts['rejected']} catalog record(s), {counts['images_failed']} image(s)",
        "embeddings": f"{counts['embeddings']} of width {report['embedding_dim']}, float16",
        "encoders": f"image {report['model'].get('image_encoder')}, "
        f"text {'none' if report['images_only'] else report['model'].get('text_encoder')}",
        "pooling": "entities are found by the mean of their images" if report["pooling"] == "mean" else None,
        "memory": remembered_line(report["remembered"]) if report["remembered"] else None,
        "images": f"{report['preprocessing'].get('size_px')} px, {report['patches']} patches",
        "ONNX parity": parity_line(encoder["parity"]),
        "int8": int8_line(encoder["int8"]) if encoder["int8"] else None,
        "float16": parity_line(encoder["float16"]) if encoder["float16"] else None,
        "index": f"{index['factory']}, {index['bytes'] / 1e6:.1f} MB ({index['why']})",
        "live": _live_line(report),
        "confidence": _calibration_line(report["calibration"]),
        "checked": "every byte hashed"
        if report["verified"] == "full"
        else "sizes checked, small files hashed (every byte with --verify)",
        "other files": ", ".join(report["unlisted_files"]) or None,
    }
    return [f"{label:<12} {text}" for label, text in lines.items() if text is not None]


def self_check_lines(check: SelfCheck) -> list[str]:
    """Describe how well a catalog distinguishes its own entities."""
    kinds = {
        f"{check.left_out.queries} images, each searched without itself": check.left_out,
        f"{check.views.queries} close-ups of entities with a single image": check.views,
    }
    lines = [
        f"found {100 * share.right / share.queries:.1f} % of {what} (95 % interval {share.low:.1f} to {share.high:.1f})"
        for what, share in kinds.items()
        if share.queries
    ]
    if check.confused:
        lines.append("most easily confused:")
    lines += [
        f"  {pair.titles[0]} and {pair.titles[1]}: {pair.errors} error(s), similarity {pair.similarity:.2f}"
        for pair in check.confused
    ]
    if check.no_confidence:
        lines.append(f"no confidence in answers: {check.no_confidence}; add images, or export with --validation")
    return lines


def _live_line(report: Mapping[str, Any]) -> str:
    if report["images_only"]:
        return "entities are put with an image or their embedding"
    if report["entity_side"] is None:
        return "no entity encoder: entities are put with their embedding"
    return f"entity encoder: adaptor and {report['entity_side']['text_encoder']}"


def _calibration_line(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "not calibrated"
    return (
        f"fitted on {calibration['queries']} queries, {calibration['correct']} answered right, "
        f"{calibration['unknown']} for unknown entities; abstains below {calibration['abstain_below']:.2f}"
    )


def int8_line(int8: Mapping[str, Any]) -> str:
    """Describe what int8 costs, from the manifest's entry."""
    return (
        f"mean cosine {int8['mean_cosine']:.4f}, lowest {int8['min_cosine']:.4f}; of {int8['images']} "
        f"{int8['judged_on']} {int8['same_top_1']:.1f} % the same top-1, right {int8['top_1_int8']:.1f} % "
        f"(float {int8['top_1_float']:.1f} %)"
    )


def remembered_line(remembered: Mapping[str, Any]) -> str:
    """Describe the remembered vectors, from the manifest's entry."""
    seen, held_out = remembered["seen"], remembered["held_out"]
    return (
        f"remembered {remembered['pictures']:,} pictures of {remembered['entities']:,} entities, handicap "
        f"{remembered['handicap']:.2f} (seen {seen['before']:.1f} -> {seen['after']:.1f} %, held-out "
        f"{held_out['before']:.1f} -> {held_out['after']:.1f} %)"
    )


def parity_line(parity: Mapping[str, Any]) -> str:
    """Describe the parity of an encoder's file with the original."""
    return f"lowest cosine {parity['min_cosine']:.6f}, largest difference {parity['max_abs_diff']:.2g}"
