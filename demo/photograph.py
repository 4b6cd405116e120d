"""Photographs of drawings, made up: printed on something, put somewhere, seen askew, badly lit, half covered, blurred.

Everything is batched torch; `strength` in 0 to 1 scales every effect and is drawn per image, so training can start
gently. The same generator with a fixed seed makes the photographed queries.

Shapes: B batch, S output side in pixels; drawings are float32 RGBA `[B, 4, H, W]` in 0 to 1, their colours
premultiplied by alpha (`premultiply`); photographs are float32 `[B, 3, S, S]` in 0 to 1.
"""

from __future__ import annotations

import io
import math
from functools import cache

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.nn import functional as F


class Photographer:
    """Draws every random number from one generator: the same seed gives the same photographs on the same `device`,
    where drawings and strengths have to be, too."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    # ---- random numbers

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device) * (high - low) + low

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _chance(self, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        """`[B, 1, 1, 1]` of zeros and ones."""
        return (self._uniform(count) < probability).float()[:, None, None, None]

    # ---- drawings

    def restyle(self, drawings_B4HW: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """What another artist might have done: other colours or none, another pose, bent, thicker or thinner lines,
        shading, an outline; of a drawing in one dark colour (a brand's mark cut in black) a plate."""
        count, _, height, width = drawings_B4HW.shape
        strength = strength_B[:, None, None, None]
        drawings_B4HW = self._on_plates(drawings_B4HW)
        alpha = drawings_B4HW[:, 3:]
        colour = drawings_B4HW[:, :3] / alpha.clamp(min=1e-3)
        mean = colour.mean(1, keepdim=True)
        saturation = 1 + strength * self._uniform(count, 1, 1, 1, low=-0.5, high=0.5)
        mixing = self._mixing(strength_B)
        colour = torch.bmm(mixing, (mean + (colour - mean) * saturation).flatten(2)).reshape(colour.shape)
        colour = colour * (1 + strength * self._uniform(count, 3, 1, 1, low=-0.15, high=0.15))
        colour = torch.where(self._chance(0.08, count) > 0, colour.mean(1, keepdim=True), colour)
        recolour = _is_black(drawings_B4HW) * self._chance(0.6, count)
        colour = colour * (1 - recolour) + recolour * self._uniform(count, 3, 1, 1, low=0.0, high=0.85)
        colour = self._lines(colour, alpha, strength_B)
        shading = F.interpolate(self._normal(count, 1, 3, 3), (height, width), mode="bicubic", align_corners=True)
        colour = colour * (1 + self._chance(0.5, count) * strength * 0.2 * shading)
        swollen = F.max_pool2d(alpha, 3, 1, 1)
        outline = self._chance(0.15 * strength_B, count) * (swollen - alpha).clamp(min=0)
        colour = colour * (1 - outline) + outline * self._uniform(count, 1, 1, 1, high=0.3)
        alpha = torch.maximum(alpha, outline)
        bend = self._normal(count, 2, 4, 4) * strength * 0.03
        bend = F.interpolate(bend, (height, width), mode="bicubic", align_corners=True)
        turn = F.affine_grid(self._turned(strength_B), [count, 1, height, width], align_corners=False)
        grid = turn + bend.permute(0, 2, 3, 1)
        premultiplied = torch.cat([colour.clamp(0, 1) * alpha, alpha], 1)
        return F.grid_sample(premultiplied, grid, align_corners=False)

    def _on_plates(self, drawings_B4HW: torch.Tensor) -> torch.Tensor:
        """Some black drawings smaller, in a light or a dark ink on a round or a square plate of any colour."""
        count, _, height, width = drawings_B4HW.shape
        smaller = torch.eye(2, 3, device=self.device) * self._uniform(count, 1, 1, low=1.3, high=1.8)
        grid = F.affine_grid(smaller, [count, 1, height, width], align_corners=False)
        mark = F.grid_sample(drawings_B4HW[:, 3:], grid, align_corners=False)
        roundness = 2 + 4 * self._chance(0.5, count)
        y = torch.linspace(-1, 1, height, device=self.device).abs()[None, None, :, None]
        x = torch.linspace(-1, 1, width, device=self.device).abs()[None, None, None, :]
        plate = ((0.95 - x**roundness - y**roundness) * 20).clamp(0, 1)
        ground = self._uniform(count, 3, 1, 1)
        is_dark = (ground.mean(1, keepdim=True) < 0.55).float()
        ink = is_dark * self._uniform(count, 1, 1, 1, low=0.85)
        plated = torch.cat([(ground * (1 - mark) + ink * mark) * plate, plate], 1)
        return torch.where(_is_black(drawings_B4HW) * self._chance(0.3, count) > 0, plated, drawings_B4HW)

    def _lines(self, colour: torch.Tensor, alpha: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """Some drawings with their dark lines thicker, as many with them thinner; what is outside takes no part."""
        thick = -F.max_pool2d(-(colour * alpha + 1 - alpha), 3, 1, 1)
        thin = F.max_pool2d(colour * alpha, 3, 1, 1)
        share, count = strength_B[:, None, None, None] * self._uniform(len(colour), 1, 1, 1), len(colour)
        other = torch.where(self._chance(0.5, count) > 0, thick, thin)
        return colour + self._chance(0.5, count) * share * (other - colour)

    def _mixing(self, strength_B: torch.Tensor) -> torch.Tensor:
        """Colour matrices `[B, 3, 3]`: hues turned a little, or, in some drawings beyond slight strength, at will."""
        count = len(strength_B)
        anywhere = self._uniform(count) < 0.6 * (strength_B - 0.35).clamp(min=0)
        angle = strength_B * self._uniform(count, low=-0.2, high=0.2)
        angle = torch.where(anywhere, self._uniform(count, low=-math.pi, high=math.pi), angle)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        # Rodrigues' formula around the axis of greys.
        across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=self.device) / math.sqrt(3)
        turned = cos * torch.eye(3, device=self.device) + (1 - cos) / 3 + sin * across
        return turned + strength_B[:, None, None] * self._normal(count, 3, 3) * 0.05

    def _turned(self, strength_B: torch.Tensor) -> torch.Tensor:
        """Affine maps `[B, 2, 3]`: tilted by up to 20 degrees, some mirrored."""
        count = len(strength_B)
        angle = strength_B * self._uniform(count, low=-1) * math.radians(20)
        mirrored = 1 - 2 * (self._uniform(count) < 0.5 * (strength_B - 0.35).clamp(min=0)).float()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        return torch.stack([mirrored * cos, -mirrored * sin, zero, sin, cos, zero], 1).reshape(count, 2, 3)

    def photograph(self, drawings_B4HW: torch.Tensor, size_px: int, strength_B: torch.Tensor) -> torch.Tensor:
        """Photographs `[B, 3, size_px, size_px]`; strength 0 is the drawing on a plain light ground, slightly moved."""
        count = len(drawings_B4HW)
        strength = strength_B[:, None, None, None]
        styled = self._on_card(drawings_B4HW, strength_B)
        ground = self._ground(styled, size_px, strength_B)
        placed = self._place(styled, size_px, strength_B)
        photo = placed[:, :3] + ground * self._shadow(placed, strength) * (1 - placed[:, 3:])
        photo = self._occlude(photo, strength_B)
        photo = self._light(photo, strength)
        photo = self._blur(photo, strength_B)
        noise = self._normal(*photo.shape) * strength * self._uniform(count, 1, 1, 1, high=0.06)
        return (photo + noise).clamp(0, 1)

    # ---- the scene

    def _on_card(self, styled: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """Some drawings are printed on a light card, which fills what is see-through."""
        card = self._chance(0.35 * strength_B, len(styled))
        tint = self._uniform(len(styled), 3, 1, 1, low=0.8, high=1.0)
        see_through = 1 - styled[:, 3:]
        return styled + card * see_through * torch.cat([tint, torch.ones_like(tint[:, :1])], 1)

    def _ground(self, styled: torch.Tensor, size_px: int, strength_B: torch.Tensor) -> torch.Tensor:
        """What lies behind: plain and light, or textured at several scales, some with another drawing out of focus."""
        count = len(styled)
        strength = strength_B[:, None, None, None]
        texture = torch.zeros(count, 3, 32, 32, device=self.device)
        for cells, weight in ((2, 0.5), (5, 0.35), (12, 0.25), (32, 0.15)):
            coarse = self._normal(count, 3, cells, cells)
            grey = coarse.mean(1, keepdim=True) * 1.5
            coarse = grey + (coarse - grey) * self._uniform(count, 1, 1, 1)
            texture += weight * self._uniform(count, 1, 1, 1) * _resized(coarse, 32)
        scene = self._uniform(count, 3, 1, 1) + texture * 0.6
        others = torch.randperm(count, generator=self.generator, device=self.device)
        clutter = _resized(F.adaptive_avg_pool2d(styled[others], 16), 48)
        x, y = torch.randint(0, 17, (2,), generator=self.generator, device=self.device)
        window = torch.arange(32, device=self.device)  # cut out by tensors: a GPU is not waited for
        clutter = clutter[..., (y + window)[:, None], x + window]
        scene = scene + self._chance(0.25, count) * 0.8 * (clutter[:, :3] - scene * clutter[:, 3:])
        plain = 1 - self._uniform(count, 3, 1, 1, high=0.15) * self._chance(0.5, count)
        busy = self._chance(strength_B * 1.5, count)
        ground = (scene * busy + plain * (1 - busy)).clamp(0, 1)
        # Nobody photographs what cannot be told from its ground: where the two are alike the ground is turned over.
        seen = styled[:, 3:].sum((2, 3)).clamp(min=1)
        luminance = (styled[:, :3].sum((2, 3)).mean(1, keepdim=True) / seen)[..., None, None]
        alike = ((luminance - ground.mean((1, 2, 3), keepdim=True)).abs() < 0.2).float() * busy * strength
        flipped = torch.where(luminance > 0.5, ground * 0.4, 0.55 + ground * 0.45)
        return _resized(ground + alike * (flipped - ground), size_px)

    def _shadow(self, placed: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """How much light is left behind the drawing: a soft shadow, to its lower right."""
        size_px = placed.shape[-1]
        soft = _resized(F.adaptive_avg_pool2d(placed[:, 3:], 16), size_px)
        shift = max(1, size_px // 32)
        soft = F.pad(soft, (shift, 0, shift, 0))[..., :size_px, :size_px]
        return 1 - 0.5 * soft * strength * self._chance(0.5, len(placed))

    def _place(self, styled: torch.Tensor, size_px: int, strength_B: torch.Tensor) -> torch.Tensor:
        """A random homography: scale, rotation, aspect, shift and perspective."""
        count = len(styled)
        s = strength_B
        scale = 1.02 - 0.5 * s * self._uniform(count) + 0.08 * self._uniform(count, low=-1)
        aspect = torch.exp(self._uniform(count, low=-1) * (0.08 + 0.2 * s))
        angle = self._uniform(count, low=-1) * s * math.radians(28)
        room = (1.15 - scale).clamp(min=0.03)
        shift = self._uniform(count, 2, low=-1) * room[:, None]
        tilt = self._uniform(count, 2, low=-1) * s[:, None] * 0.25
        cos, sin = angle.cos(), angle.sin()
        one = torch.ones_like(scale)
        to_drawing = torch.stack(
            [
                cos / (scale * aspect), sin / (scale * aspect), -shift[:, 0] / scale,
                -sin * aspect / scale, cos * aspect / scale, -shift[:, 1] / scale,
                tilt[:, 0], tilt[:, 1], one,
            ],
            1,
        ).reshape(count, 3, 3)  # fmt: skip
        axis = (torch.arange(size_px, device=self.device) + 0.5) / size_px * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        points = torch.stack([x, y, torch.ones_like(x)], -1).reshape(1, -1, 3)
        mapped = points @ to_drawing.transpose(1, 2)
        grid = (mapped[..., :2] / mapped[..., 2:].clamp(min=0.2)).reshape(count, size_px, size_px, 2)
        factor = max(1, styled.shape[-1] // size_px)
        source = F.avg_pool2d(styled, factor) if factor > 1 else styled
        return F.grid_sample(source, grid, align_corners=False)

    def _occlude(self, photo: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        count, _, size_px, _ = photo.shape
        axis = torch.linspace(0, 1, size_px, device=self.device)
        x, y = axis[None, None, None, :], axis[None, None, :, None]
        centre = self._uniform(count, 2)
        extent = self._uniform(count, 2, low=0.05, high=0.2)
        dx = (x - centre[:, 0, None, None, None]).abs() / extent[:, 0, None, None, None]
        dy = (y - centre[:, 1, None, None, None]).abs() / extent[:, 1, None, None, None]
        box = ((dx < 1) & (dy < 1)).float()
        blob = (dx**2 + dy**2 < 1).float()
        shape = torch.where(self._chance(0.5, count) > 0, box, blob) * self._chance(0.4 * strength_B, count)
        return photo * (1 - shape) + self._uniform(count, 3, 1, 1) * shape

    def _light(self, photo: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        count, _, size_px, _ = photo.shape
        gamma = torch.exp(strength * self._uniform(count, 1, 1, 1, low=-0.5, high=0.5))
        corners = 1 + strength * self._uniform(count, 1, 2, 2, low=-0.4, high=0.25)
        falloff = F.interpolate(corners, (size_px, size_px), mode="bilinear", align_corners=True)
        cast = 1 + strength * self._uniform(count, 3, 1, 1, low=-0.15, high=0.15)
        contrast = 1 + strength * self._uniform(count, 1, 1, 1, low=-0.35, high=0.2)
        lit = photo.clamp(1e-4, 1) ** gamma * falloff * cast
        return ((lit - 0.5) * contrast + 0.5).clamp(0, 1)

    def _blur(self, photo: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """A Gaussian of up to 1.3 % of the side, stretched at random as by a moving hand."""
        count, channels, size_px, _ = photo.shape
        most = 0.013 * size_px
        reach = math.ceil(2 * most)
        offsets = torch.arange(-reach, reach + 1, device=self.device).float()
        kernels = []
        for _ in range(2):
            sigma = (strength_B * self._uniform(count) * most).clamp(min=0.05)
            kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)
            kernels.append(kernel / kernel.sum(1, keepdim=True))
        flat = photo.reshape(1, count * channels, size_px, size_px)
        wide, tall = (k.repeat_interleave(channels, 0) for k in kernels)
        flat = F.conv2d(
            F.pad(flat, (reach, reach, 0, 0), mode="replicate"), wide[:, None, None, :], groups=count * channels
        )
        flat = F.conv2d(
            F.pad(flat, (0, 0, reach, reach), mode="replicate"), tall[:, None, :, None], groups=count * channels
        )
        return flat.reshape(photo.shape)

    def compress(self, photo: torch.Tensor, strength_B: torch.Tensor, probability: float = 0.3) -> torch.Tensor:
        """Some photographs as JPEG at quality 95 down to 30 leaves them."""
        chosen = self._chance(probability * (strength_B > 0.05), len(photo)) > 0
        quality_B = (95 - 65 * strength_B * self._uniform(len(photo))).long()
        return torch.where(chosen, through_jpeg(photo, quality_B), photo)


def _is_black(drawings_B4HW: torch.Tensor) -> torch.Tensor:
    """`[B, 1, 1, 1]`: 1 for a drawing in one dark colour."""
    return (drawings_B4HW[:, :3].amax((1, 2, 3)) < 0.2).float()[:, None, None, None]


@cache
def _quantisation(device: torch.device) -> torch.Tensor:
    """The encoder's own tables `[100, 2, 8, 8]`, by quality, 1 first: for brightness, and for colours."""
    tables = []
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        buffer.seek(0)
        of_quality = JpegImageFile(buffer).quantization
        tables.append([of_quality[0], of_quality[1]])
    return torch.tensor(tables, dtype=torch.float32, device=device).reshape(-1, 2, 8, 8)


def through_jpeg(photos_B3SS: torch.Tensor, quality_B: torch.Tensor) -> torch.Tensor:
    """What an image is after JPEG with colours at half size, as ITU-T T.81 has it; sides of whole 16 pixels.

    All that loses anything, in batched torch on the photographs' device; the coding that follows loses nothing.
    """
    device, side = photos_B3SS.device, photos_B3SS.shape[-1]
    red, green, blue = (255 * photos_B3SS).round().unbind(1)
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    colours = torch.stack([(blue - brightness) / 1.772, (red - brightness) / 1.402], 1)
    tables_B288 = _quantisation(device)[quality_B - 1]
    brightness = _quantised((brightness - 128)[:, None], tables_B288[:, :1]) + 128
    colours = _quantised(F.avg_pool2d(colours, 2), tables_B288[:, 1:])
    to_blue, to_red = _resized(colours, side).chunk(2, 1)
    red, blue = brightness + 1.402 * to_red, brightness + 1.772 * to_blue
    green = (brightness - 0.299 * red - 0.114 * blue) / 0.587
    return (torch.cat([red, green, blue], 1).round() / 255).clamp(0, 1)


def _quantised(planes_BCHW: torch.Tensor, tables_B188: torch.Tensor) -> torch.Tensor:
    """Each block of 8 x 8 to cosines, those rounded to multiples of the table's, and back."""
    count, channels, height, width = planes_BCHW.shape
    steps = torch.arange(8, device=planes_BCHW.device)
    cosines = torch.cos((2 * steps + 1) * steps[:, None] * math.pi / 16) / 2
    cosines[0] /= math.sqrt(2)
    blocks = planes_BCHW.reshape(count, channels, height // 8, 8, width // 8, 8).permute(0, 1, 2, 4, 3, 5)
    tables = tables_B188[:, :, None, None]
    coefficients = ((cosines @ blocks @ cosines.T) / tables).round() * tables
    restored = cosines.T @ coefficients @ cosines
    return restored.permute(0, 1, 2, 4, 3, 5).reshape(planes_BCHW.shape)


def _resized(images: torch.Tensor, size_px: int) -> torch.Tensor:
    return F.interpolate(images, (size_px, size_px), mode="bilinear", align_corners=False)


def premultiply(drawings_B4HW: torch.Tensor) -> torch.Tensor:
    """Colours times alpha: what can be resampled and laid over another image without dark or light fringes."""
    alpha = drawings_B4HW[:, 3:]
    return torch.cat([drawings_B4HW[:, :3] * alpha, alpha], 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image as float32 `[channels, H, W]` in 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_jpeg(photo_3HW: torch.Tensor, quality: int) -> bytes:
    pixels = (photo_3HW * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
