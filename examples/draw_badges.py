"""Sample pictures: 20 badges of invented clubs, five pictures of each.

    python examples/draw_badges.py pictures

writes 100 pictures and `pictures.csv`, the same each time. Each picture shows its badge rotated, in perspective, on a
random background and in random light.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from core.cli import run

SIZE_PX = 256
PICTURES_EACH = 5
COLOURS = {
    "red": (200, 40, 45),
    "blue": (30, 70, 160),
    "green": (30, 130, 70),
    "gold": (235, 180, 40),
    "purple": (110, 50, 140),
    "black": (30, 30, 35),
    "white": (245, 245, 240),
    "orange": (235, 120, 35),
}
# Title, shape of the badge, emblem on it, colours of both.
BADGES = (
    ("Harbour Rowers", "disc", "waves", "blue", "white"),
    ("Northern Stargazers", "disc", "star", "black", "gold"),
    ("Old Mill Choir", "shield", "cross", "red", "white"),
    ("Pine Valley Hikers", "shield", "tree", "green", "gold"),
    ("Lantern Street Chess Club", "square", "checks", "black", "white"),
    ("Hillside Beekeepers", "diamond", "rings", "gold", "black"),
    ("Ferry Lane Runners", "disc", "bars", "orange", "white"),
    ("Moonlight Sailors", "shield", "moon", "blue", "gold"),
    ("Copper Gate Archers", "disc", "rings", "white", "red"),
    ("Violet Hall Quartet", "square", "bars", "purple", "gold"),
    ("West Quay Divers", "diamond", "waves", "green", "white"),
    ("Midwinter Skaters", "square", "star", "white", "blue"),
    ("Orchard Road Gardeners", "disc", "tree", "white", "green"),
    ("Signal Box Engineers", "diamond", "cross", "black", "orange"),
    ("Night Market Cooks", "square", "moon", "purple", "white"),
    ("Stone Bridge Climbers", "shield", "checks", "gold", "purple"),
    ("Red Kite Flyers", "diamond", "star", "red", "gold"),
    ("East Dock Swimmers", "shield", "waves", "white", "blue"),
    ("Clock Tower Cyclists", "square", "rings", "green", "orange"),
    ("Market Cross Readers", "disc", "cross", "purple", "white"),
)

Colour = tuple[int, int, int]


def badge(shape: str, emblem: str, ground: str, colour: str) -> Image.Image:
    """Draw one badge, RGBA."""
    image = Image.new("RGBA", (SIZE_PX, SIZE_PX), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw_outline(draw, shape, COLOURS[ground], COLOURS[colour])
    draw_emblem(draw, emblem, COLOURS[colour])
    return image


def draw_outline(draw: ImageDraw.ImageDraw, shape: str, fill: Colour, edge: Colour) -> None:
    """Draw the outline of the badge, 216 pixels across."""
    low, high, middle = 20, SIZE_PX - 20, SIZE_PX / 2
    if shape == "disc":
        draw.ellipse((low, low, high, high), fill=fill, outline=edge, width=8)
        return
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(low, low), (high, low), (high, high), (low, high)],
        "diamond": [(middle, low), (high, middle), (middle, high), (low, middle)],
        "shield": [(low, low), (high, low), (high, 150), (middle, high), (low, 150)],
    }
    draw.polygon(corners[shape], fill=fill, outline=edge, width=8)


def draw_emblem(draw: ImageDraw.ImageDraw, emblem: str, colour: Colour) -> None:
    """Draw what is on the badge."""
    match emblem:
        case "star":
            corners = [((62, 26)[corner % 2], math.pi * corner / 5) for corner in range(10)]
            draw.polygon([(128 + r * math.sin(angle), 124 - r * math.cos(angle)) for r, angle in corners], fill=colour)
        case "waves":
            for y in (95, 125, 155):
                draw.line([(x, y + 9 * math.sin(x / 11)) for x in range(72, 186)], fill=colour, width=11)
        case "tree":
            for top in (60, 88, 116):
                draw.polygon([(128, top), (128 - 46, top + 46), (128 + 46, top + 46)], fill=colour)
            draw.rectangle((120, 160, 136, 190), fill=colour)
        case "cross":
            draw.rectangle((112, 66, 144, 184), fill=colour)
            draw.rectangle((70, 105, 186, 137), fill=colour)
        case "checks":
            for row in range(4):
                for column in range(row % 2, 4, 2):
                    draw.rectangle((76 + 26 * column, 70 + 26 * row, 101 + 26 * column, 95 + 26 * row), fill=colour)
        case "rings":
            for radius in (58, 36, 14):
                draw.ellipse((128 - radius, 124 - radius, 128 + radius, 124 + radius), outline=colour, width=10)
        case "bars":
            for left in (76, 112, 148):
                draw.rectangle((left, 76, left + 20, 180), fill=colour)
        case "moon":
            draw.pieslice((70, 66, 186, 182), 60, 300, fill=colour)


def picture(drawn: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Place the badge: rotated by up to 15 degrees, in perspective, on two colours, brighter or darker, blurred."""
    first, second = (tuple(int(value) for value in rng.integers(90, 220, size=3)) for _ in range(2))
    ground = Image.new("RGB", (SIZE_PX, SIZE_PX), first)
    ImageDraw.Draw(ground).rectangle((0, int(rng.integers(60, 200)), SIZE_PX, SIZE_PX), fill=second)
    turned = drawn.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BICUBIC)
    corners = np.array([(0, 0), (0, SIZE_PX), (SIZE_PX, SIZE_PX), (SIZE_PX, 0)]) + rng.uniform(-28, 12, size=(4, 2))
    askew = turned.transform(
        (SIZE_PX, SIZE_PX), Image.Transform.QUAD, tuple(corners.flatten().tolist()), Image.Resampling.BICUBIC
    )
    ground.paste(askew, mask=askew)
    lit = ImageEnhance.Brightness(ground).enhance(float(rng.uniform(0.75, 1.2)))
    return lit.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Draw 100 pictures into FOLDER, with pictures.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    with (folder / "pictures.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "title", "text", "types"])
        for title, shape, emblem, ground, colour in BADGES:
            drawn = badge(shape, emblem, ground, colour)
            about = f"The badge of the {title}: a {ground} {shape} with {colour} {emblem}."
            for number in range(1, PICTURES_EACH + 1):
                name = f"{title.lower().replace(' ', '-')}-{number}.jpg"
                picture(drawn, rng).save(folder / name, quality=88)
                table.writerow([name, title, about if number == 1 else "", shape if number == 1 else ""])
    click.echo(f"{folder}: {len(BADGES) * PICTURES_EACH} pictures of {len(BADGES)} badges, and pictures.csv")


if __name__ == "__main__":
    run(main)
