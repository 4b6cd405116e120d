"""Turn an image into the input of an image encoder: resize, crop, normalise. For training, change it at random.

Shapes: B batch, H = W = size_px.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from core.arrays import Float32Array, Float64Array, Pixels
from core.errors import BadParameter, EncoderSpecError
from imaging.decode import MAX_PIXELS, decode

Box = tuple[float, float, float, float]  # x, y, width, height as fractions of the upright image

Resize = Literal["shortest", "squash"]
Crop = Literal["center", "none"]
Interpolation = Literal["bicubic", "bilinear"]

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_CHOICES = {"resize": get_args(Resize), "crop": get_args(Crop), "interpolation": get_args(Interpolation)}
_SMALLEST_BOX_SIDE = 0.001
_COLOUR = 0.5  # brightness, contrast and saturation change by up to this share
_MAX_BLUR = 0.02  # radius, as a share of the image


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The preprocessing of an encoder. It is stored with the weights, so there are no defaults.

    `resize="shortest"` scales the shorter side to `resize_px`, or `size_px` if that is None, and needs `crop="center"`.
    `"squash"` scales both sides to `size_px`. `mean` and `std` refer to RGB values from 0 to 1.
    """

    size_px: int
    resize: Resize
    crop: Crop
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_px: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the JSON form. Raises `EncoderSpecError` that names the wrong field."""
        fields = cls.__dataclass_fields__.keys() - {"resize_px"}
        if values.keys() - {"resize_px"} != fields:
            wrong = ", ".join(sorted(fields ^ (values.keys() - {"resize_px"})))
            raise EncoderSpecError(f"preprocessing has missing or unknown fields: {wrong}; give {sorted(fields)}")
        size_px = values["size_px"]
        if not isinstance(size_px, int) or isinstance(size_px, bool) or not 1 <= size_px <= 4096:
            raise EncoderSpecError(f"preprocessing.size_px is {size_px!r}; give pixels from 1 to 4096")
        for field, choices in _CHOICES.items():
            if values[field] not in choices:
                raise EncoderSpecError(f"preprocessing.{field} is {values[field]!r}; give one of {', '.join(choices)}")
        if values["resize"] == "shortest" and values["crop"] == "none":
            raise EncoderSpecError(
                'preprocessing with resize "shortest" and crop "none" gives images of different shapes; '
                'use crop "center" or resize "squash"'
            )
        resize_px = values.get("resize_px")
        if resize_px is not None and (
            values["resize"] != "shortest" or type(resize_px) is not int or not size_px <= resize_px <= 4096
        ):
            raise EncoderSpecError(
                f'preprocessing.resize_px is {resize_px!r}; give pixels from size_px to 4096, with resize "shortest"'
            )
        mean, std = _three_numbers("mean", values["mean"]), _three_numbers("std", values["std"], positive=True)
        return cls(**{**values, "mean": mean, "std": std})

    def whole(self) -> Self:
        """Return the preprocessing that keeps all of an image, but not its proportions."""
        return replace(self, resize="squash", crop="none", resize_px=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, which `from_dict` reads."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        if self.resize_px is None:  # hashes of earlier versions lack it
            del values["resize_px"]
        return values


def _three_numbers(field: str, value: Any, *, positive: bool = False) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(number) for number in value)
    except (TypeError, ValueError):
        raise EncoderSpecError(f"preprocessing.{field} is {value!r}; give three numbers") from None
    if not all(math.isfinite(n) and (n > 0 or not positive) for n in (red, green, blue)):
        raise EncoderSpecError(f"preprocessing.{field} is {value!r}; give three {'positive ' * positive}numbers")
    return red, green, blue


def check_box(box: Box) -> None:
    """Raise `BadParameter` unless `box` is a region within the image."""
    x, y, width, height = box
    within = x >= 0 and y >= 0 and x + width <= 1 + 1e-6 and y + height <= 1 + 1e-6
    if not (within and width >= _SMALLEST_BOX_SIDE and height >= _SMALLEST_BOX_SIDE):
        raise BadParameter(
            f"box {x:g},{y:g},{width:g},{height:g} is not within the image; give x,y,w,h as fractions from 0 to 1, "
            f"w and h at least {_SMALLEST_BOX_SIDE}, x+w and y+h at most 1"
        )


def load_pixels(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS, box: Box | None = None
) -> Pixels:
    """Decode image bytes, or the region `box` of the image, to uint8 `[H, W, 3]`.

    Raises `BadParameter` for a box outside the image, `TooLarge`, `UndecodableImage`.
    """
    return load_region(data, preprocessing, max_pixels=max_pixels, box=box)[0]


def load_region(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int, box: Box | None = None
) -> tuple[Pixels, Box]:
    """Return what `load_pixels` returns, and the region of the upright image that the pixels show."""
    image = decode(data, max_pixels=max_pixels, target_px=needed_px(preprocessing, box))
    return to_pixels(image, preprocessing, box), covered_region(image, preprocessing, box)


def load_squares(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int, boxes: Sequence[Box]
) -> list[tuple[Box, Pixels]]:
    """Return the smallest square around each box, as far as it fits into the image, and what `load_pixels` does for it.

    The image is decoded once. Raises as `load_pixels` does.
    """
    image = decode(data, max_pixels=max_pixels, target_px=max(needed_px(preprocessing, box) for box in boxes))
    squares = [_square_around(box, image.width, image.height) for box in boxes]
    return [(square, to_pixels(image, preprocessing, square)) for square in squares]


def _square_around(box: Box, image_width: int, image_height: int) -> Box:
    x, y, width, height = box
    side_px = max(width * image_width, height * image_height)
    square_width, square_height = min(side_px / image_width, 1.0), min(side_px / image_height, 1.0)
    left = min(max(x + (width - square_width) / 2, 0.0), 1.0 - square_width)
    top = min(max(y + (height - square_height) / 2, 0.0), 1.0 - square_height)
    return left, top, square_width, square_height


def needed_px(preprocessing: Preprocessing, box: Box | None) -> int:
    """Return the side the whole image needs for `box` to fill the encoder's input. Raises `BadParameter`."""
    resize_px = preprocessing.resize_px or preprocessing.size_px
    if box is None:
        return resize_px
    check_box(box)
    return math.ceil(resize_px / min(box[2], box[3]))


def resize_bytes(preprocessing: Preprocessing, width: int, height: int) -> int:
    """Return the memory that `to_pixels` takes at most. Pillow resizes rows first, at the image's full height."""
    rows = min(width, height) if preprocessing.resize == "shortest" else max(width, height)
    return 4 * preprocessing.size_px * rows


def to_pixels(image: Image.Image, preprocessing: Preprocessing, box: Box | None = None) -> Pixels:
    """Resize and crop an RGB image, or its region `box`, to uint8 `[H, W, 3]`. Raises `BadParameter`."""
    size_px = preprocessing.size_px
    left, top, width, height = _covered_px(image.width, image.height, preprocessing, box)
    region = (left, top, min(left + width, image.width), min(top + height, image.height))
    resized = image.resize((size_px, size_px), _RESAMPLING[preprocessing.interpolation], box=region)
    return np.array(resized, dtype=np.uint8)


def covered_region(image: Image.Image, preprocessing: Preprocessing, box: Box | None = None) -> Box:
    """Return the region that `to_pixels` keeps after resizing and cropping."""
    left, top, width, height = _covered_px(image.width, image.height, preprocessing, box)
    return left / image.width, top / image.height, width / image.width, height / image.height


def _covered_px(
    image_width: int, image_height: int, preprocessing: Preprocessing, box: Box | None
) -> tuple[float, float, float, float]:
    """Return left, top, width and height, in pixels, of the region that `to_pixels` scales."""
    left, top, width, height = 0.0, 0.0, float(image_width), float(image_height)
    if box is not None:
        check_box(box)
        left, top = box[0] * width, box[1] * height
        width, height = min(box[2] * width, width - left), min(box[3] * height, height - top)
    size_px = preprocessing.size_px
    if preprocessing.resize == "shortest":
        # Resize and crop in one pass, so that a strip of 1 x 60,000 pixels is never scaled up to its full length. The
        # crop is rounded to whole pixels of the resized image, as in the reference preprocessors.
        shorter = min(width, height)
        resize_px = preprocessing.resize_px or size_px
        resized_width, resized_height = (max(resize_px, int(resize_px * side / shorter)) for side in (width, height))
        left += (resized_width - size_px) // 2 * width / resized_width
        top += (resized_height - size_px) // 2 * height / resized_height
        width, height = size_px * width / resized_width, size_px * height / resized_height
    return left, top, width, height


def normalise(pixels_BHW3: Pixels, preprocessing: Preprocessing) -> Float32Array:
    """Subtract the mean and divide by the standard deviation: uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]`."""
    batch, height, width, _ = pixels_BHW3.shape
    normalised = np.empty((batch, 3, height, width), np.float32)
    tables = normalised_values(preprocessing)
    for pixels_HW3, normalised_3HW in zip(pixels_BHW3, normalised, strict=True):
        for channel, table in enumerate(tables):
            # A byte is never out of range, but mode="clip" lets numpy write to a contiguous `out` without a buffer.
            np.take(table, pixels_HW3[..., channel], out=normalised_3HW[channel], mode="clip")
    return normalised


@lru_cache(maxsize=16)
def normalised_values(preprocessing: Preprocessing) -> Float32Array:
    """Return float32 `[3, 256]`: the normalised value of each byte. A lookup is 3 times as fast as arithmetic."""
    values = np.arange(256, dtype=np.float64) / 255
    mean, std = np.array(preprocessing.mean)[:, None], np.array(preprocessing.std)[:, None]
    tables: Float64Array = (values - mean) / std
    return tables.astype(np.float32)


def changed_view(pixels_HW3: Pixels, seed: tuple[int, int], sides: tuple[float, float]) -> Pixels:
    """Return a square crop with other colours, blurred, and mirrored half of the time. Equal seeds give equal views.

    Views are queries for an entity that has no other image. `sides` are the least and the greatest side of the crop, as
    shares of the image's.
    """
    rng = np.random.default_rng(seed)
    size_px = len(pixels_HW3)
    side = rng.uniform(*sides) * size_px
    left, top = rng.uniform(0, size_px - side, 2)
    image = Image.fromarray(pixels_HW3)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - _COLOUR, 1 + _COLOUR))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, _MAX_BLUR) * size_px)))
