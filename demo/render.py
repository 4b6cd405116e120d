"""Drawings to pixels: SVG to a square RGBA image, and the names of its main colours."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

DRAWING_PX = 128

# Reference points for naming colours, sRGB.
_COLOURS = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "light grey": (200, 200, 200),
    "white": (250, 250, 250),
    "red": (215, 40, 45),
    "dark red": (130, 20, 25),
    "orange": (245, 140, 30),
    "brown": (130, 80, 45),
    "yellow": (252, 210, 50),
    "beige": (235, 210, 170),
    "light green": (150, 205, 80),
    "green": (30, 150, 60),
    "dark green": (15, 85, 45),
    "turquoise": (40, 190, 180),
    "light blue": (110, 190, 240),
    "blue": (30, 100, 210),
    "dark blue": (20, 35, 110),
    "purple": (130, 60, 170),
    "pink": (240, 130, 175),
}


def render(svg: str) -> Image.Image:
    """An RGBA image of `DRAWING_PX` x `DRAWING_PX`, the drawing centred and as large as fits."""
    probe = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))
    side = "width" if probe.width >= probe.height else "height"
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **{side: DRAWING_PX})
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (DRAWING_PX, DRAWING_PX))
    square.paste(drawing, ((DRAWING_PX - drawing.width) // 2, (DRAWING_PX - drawing.height) // 2))
    return square


def is_blank(rgba: npt.NDArray[np.uint8], *, on_white: bool = False) -> bool:
    """True if nothing can be seen: a drawing whose features the renderer does not know comes out empty. `on_white` it
    takes a mark in white for nothing, too."""
    visible = rgba[..., 3] > 16
    if on_white:
        visible &= (rgba[..., :3] < 240).any(axis=-1)
    return bool(visible.mean() < 0.005)


def main_colours(rgba: npt.NDArray[np.uint8], *, most: int = 3, least_share: float = 0.1) -> list[str]:
    """Names of the colours that cover most of the visible pixels, the largest first."""
    visible = rgba[rgba[..., 3] > 128][:, :3].astype(np.float32)
    if not len(visible):
        return []
    names = list(_COLOURS)
    reference = np.array(list(_COLOURS.values()), dtype=np.float32)
    nearest = ((visible[:, None, :] - reference[None]) ** 2).sum(-1).argmin(1)
    share = np.bincount(nearest, minlength=len(names)) / len(visible)
    return [names[i] for i in np.argsort(-share, kind="stable")[:most] if share[i] >= least_share]
