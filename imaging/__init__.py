"""Decode, resize and normalise images, with numpy and Pillow (no torch)."""

from imaging.decode import canonical_type, decode, make_thumbnail, readable_types, sniff
from imaging.decoder import Decoder, automatic_budget
from imaging.preprocess import (
    Box,
    Preprocessing,
    check_box,
    load_pixels,
    load_region,
    load_squares,
    normalise,
    to_pixels,
)

__all__ = [
    "Box",
    "Decoder",
    "Preprocessing",
    "automatic_budget",
    "canonical_type",
    "check_box",
    "decode",
    "load_pixels",
    "load_region",
    "load_squares",
    "make_thumbnail",
    "normalise",
    "readable_types",
    "sniff",
    "to_pixels",
]
