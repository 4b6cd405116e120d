"""Synthetic photographs of drawings: on a background, in perspective, badly lit, partly covered, blurred.

Everything but JPEG is batched torch. `strength`, from 0 to 1 and per image, scales every effect. The photographed
queries are made with a fixed seed.

Shapes: B batch, S output side in pixels. Drawings are float32 RGBA `[B, 4, H, W]` from 0 to 1, their colours
premultiplied by alpha (`premultiply`). Photographs are float32 `[B, 3, S, S]` from 0 to 1.
"""

import io
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


class Photographer:
    """Draws all random numbers from one generator: the same seed gives the same photographs on the same device.

    Drawings and strengths must be on that device.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    # ---- random numbers

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device) * (high - low) + low

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _chance(self, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        """Return random zeros and ones, `[B, 1, 1, 1]`."""
        return (self._uniform(count) < probability).float()[:, None, None, None]

    # ---- drawings

    def restyle(self, drawings_B4HW: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """Change a drawing as another artist might: colours, pose, shape, line width, shading, outline.

        A drawing in one dark colour, such as a brand's mark, may also be put on a plate.
        """
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
        """Put some black drawings, smaller and in a light or dark ink, on a round or square plate of any colour."""
        count, _, height, width = drawings_B4HW.shape
        smaller = torch.eye(2, 3, device=self.device) * self._uniform(count, 1, 1, low=1.3, high=1.8)
        grid = F.affine_grid(smaller, [count, 1, height, width], align_corners=False)
        mark = F.grid_sample(drawings_B4HW[:, 3:], grid, align_corners=False)
        roundness = 2 + 4 * self._chance(0.5, count)
        y = torch.linspace(-1, 1, height, device=self.device).abs()[:, None]
        x = torch.linspace(-1, 1, width, device=self.device).abs()
        plate = ((0.95 - x**roundness - y**roundness) * 20).clamp(0, 1)
        ground = self._uniform(count, 3, 1, 1)
        is_dark = (ground.mean(1, keepdim=True) < 0.55).float()
        ink = is_dark * self._uniform(count, 1, 1, 1, low=0.85)
        plated = torch.cat([(ground * (1 - mark) + ink * mark) * plate, plate], 1)
        return torch.where(_is_black(drawings_B4HW) * self._chance(0.3, count) > 0, plated, drawings_B4HW)

    def _lines(self, colour: torch.Tensor, alpha: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """Make the dark lines of some drawings thicker, and of as many thinner."""
        count = len(colour)
        thick = -F.max_pool2d(-(colour * alpha + 1 - alpha), 3, 1, 1)
        thin = F.max_pool2d(colour * alpha, 3, 1, 1)
        share = strength_B[:, None, None, None] * self._uniform(count, 1, 1, 1)
        other = torch.where(self._chance(0.5, count) > 0, thick, thin)
        return colour + self._chance(0.5, count) * share * (other - colour)

    def _mixing(self, strength_B: torch.Tensor) -> torch.Tensor:
        """Return colour matrices `[B, 3, 3]` that shift the hue: slightly, or by any angle at higher strength."""
        count = len(strength_B)
        anywhere = self._uniform(count) < 0.6 * (strength_B - 0.35).clamp(min=0)
        angle = strength_B * self._uniform(count, low=-0.2, high=0.2)
        angle = torch.where(anywhere, self._uniform(count, low=-math.pi, high=math.pi), angle)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        # Rodrigues' rotation formula around the grey axis.
        across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=self.device) / math.sqrt(3)
        turned = cos * torch.eye(3, device=self.device) + (1 - cos) / 3 + sin * across
        return turned + strength_B[:, None, None] * self._normal(count, 3, 3) * 0.05

    def _turned(self, strength_B: torch.Tensor) -> torch.Tensor:
        """Return affine maps `[B, 2, 3]`: rotated by up to 20 degrees, some mirrored."""
        count = len(strength_B)
        angle = strength_B * self._uniform(count, low=-1) * math.radians(20)
        mirrored = 1 - 2 * (self._uniform(count) < 0.5 * (strength_B - 0.35).clamp(min=0)).float()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        return torch.stack([mirrored * cos, -mirrored * sin, zero, sin, cos, zero], 1).reshape(count, 2, 3)

    def photograph(self, drawings_B4HW: torch.Tensor, size_px: int, strength_B: torch.Tensor) -> torch.Tensor:
        """Return photographs `[B, 3, S, S]`. Strength 0 gives the drawing on a plain light ground, slightly moved."""
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
        """Print some drawings on a light card, which fills their transparent parts."""
        card = self._chance(0.35 * strength_B, len(styled))
        tint = self._uniform(len(styled), 3, 1, 1, low=0.8, high=1.0)
        transparent = 1 - styled[:, 3:]
        return styled + card * transparent * torch.cat([tint, torch.ones_like(tint[:, :1])], 1)

    def _ground(self, styled: torch.Tensor, size_px: int, strength_B: torch.Tensor) -> torch.Tensor:
        """Return backgrounds: plain and light, or textured at several scales, some with a blurred drawing."""
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
        window = torch.arange(32, device=self.device)  # indexing with tensors does not wait for the GPU
        clutter = clutter[..., (y + window)[:, None], x + window]
        scene = scene + self._chance(0.25, count) * 0.8 * (clutter[:, :3] - scene * clutter[:, 3:])
        plain = 1 - self._uniform(count, 3, 1, 1, high=0.15) * self._chance(0.5, count)
        busy = self._chance(strength_B * 1.5, count)
        ground = (scene * busy + plain * (1 - busy)).clamp(0, 1)
        # Where drawing and background have the same brightness, change the background's.
        visible = styled[:, 3:].sum((2, 3)).clamp(min=1)
        luminance = (styled[:, :3].sum((2, 3)).mean(1, keepdim=True) / visible)[..., None, None]
        alike = ((luminance - ground.mean((1, 2, 3), keepdim=True)).abs() < 0.2).float() * busy * strength
        flipped = torch.where(luminance > 0.5, ground * 0.4, 0.55 + ground * 0.45)
        return _resized(ground + alike * (flipped - ground), size_px)

    def _shadow(self, placed: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """Return the light on the background: a soft shadow to the lower right of the drawing."""
        size_px = placed.shape[-1]
        soft = _resized(F.adaptive_avg_pool2d(placed[:, 3:], 16), size_px)
        shift = max(1, size_px // 32)
        soft = F.pad(soft, (shift, 0, shift, 0))[..., :size_px, :size_px]
        return 1 - 0.5 * soft * strength * self._chance(0.5, len(placed))

    def _place(self, styled: torch.Tensor, size_px: int, strength_B: torch.Tensor) -> torch.Tensor:
        """Apply a random homography: scale, rotation, aspect ratio, shift and perspective."""
        count, s = len(styled), strength_B
        scale = 1.02 - 0.5 * s * self._uniform(count) + 0.08 * self._uniform(count, low=-1)
        aspect = torch.exp(self._uniform(count, low=-1) * (0.08 + 0.2 * s))
        angle = self._uniform(count, low=-1) * s * math.radians(28)
        room = (1.15 - scale).clamp(min=0.03)
        shift = self._uniform(count, 2, low=-1) * room[:, None]
        tilt = self._uniform(count, 2, low=-1) * s[:, None] * 0.25
        cos, sin = angle.cos(), angle.sin()
        across = [cos / (scale * aspect), sin / (scale * aspect), -shift[:, 0] / scale]
        down = [-sin * aspect / scale, cos * aspect / scale, -shift[:, 1] / scale]
        depth = [tilt[:, 0], tilt[:, 1], torch.ones_like(scale)]
        to_drawing = torch.stack([*across, *down, *depth], 1).reshape(count, 3, 3)
        axis = (torch.arange(size_px, device=self.device) + 0.5) / size_px * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        points = torch.stack([x, y, torch.ones_like(x)], -1).reshape(1, -1, 3)
        mapped = points @ to_drawing.transpose(1, 2)
        grid = (mapped[..., :2] / mapped[..., 2:].clamp(min=0.2)).reshape(count, size_px, size_px, 2)
        factor = max(1, styled.shape[-1] // size_px)
        source = F.avg_pool2d(styled, factor) if factor > 1 else styled
        return F.grid_sample(source, grid, align_corners=False)

    def _occlude(self, photo: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """Cover part of some photographs with a box or ellipse of one colour."""
        count, _, size_px, _ = photo.shape
        axis = torch.linspace(0, 1, size_px, device=self.device)
        centre = self._uniform(count, 2)[:, :, None, None]
        extent = self._uniform(count, 2, low=0.05, high=0.2)[:, :, None, None]
        dx = (axis - centre[:, :1]).abs() / extent[:, :1]
        dy = (axis[:, None] - centre[:, 1:]).abs() / extent[:, 1:]
        box = ((dx < 1) & (dy < 1)).float()
        blob = (dx**2 + dy**2 < 1).float()
        shape = torch.where(self._chance(0.5, count) > 0, box, blob) * self._chance(0.4 * strength_B, count)
        return photo * (1 - shape) + self._uniform(count, 3, 1, 1) * shape

    def _light(self, photo: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """Vary exposure, falloff, colour cast and contrast."""
        count, _, size_px, _ = photo.shape
        gamma = torch.exp(strength * self._uniform(count, 1, 1, 1, low=-0.5, high=0.5))
        corners = 1 + strength * self._uniform(count, 1, 2, 2, low=-0.4, high=0.25)
        falloff = F.interpolate(corners, (size_px, size_px), mode="bilinear", align_corners=True)
        cast = 1 + strength * self._uniform(count, 3, 1, 1, low=-0.15, high=0.15)
        contrast = 1 + strength * self._uniform(count, 1, 1, 1, low=-0.35, high=0.2)
        lit = photo.clamp(1e-4, 1) ** gamma * falloff * cast
        return ((lit - 0.5) * contrast + 0.5).clamp(0, 1)

    def _blur(self, photo: torch.Tensor, strength_B: torch.Tensor) -> torch.Tensor:
        """Blur with a Gaussian of up to 1.3 % of the side, of random aspect ratio, as by a moving hand."""
        count, channels, size_px, _ = photo.shape
        most = 0.013 * size_px
        reach = math.ceil(2 * most)
        offsets = torch.arange(-reach, reach + 1, device=self.device).float()
        flat = photo.reshape(1, count * channels, size_px, size_px)
        for _ in range(2):  # each pass blurs along the rows, then transposes
            sigma = (strength_B * self._uniform(count) * most).clamp(min=0.05)
            kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)
            kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None, :]
            padded = F.pad(flat, (reach, reach, 0, 0), mode="replicate")
            flat = F.conv2d(padded, kernel, groups=count * channels).transpose(2, 3)
        return flat.reshape(photo.shape)

    def compress(self, photos: torch.Tensor, strength_B: torch.Tensor, probability: float = 0.3) -> torch.Tensor:
        """Save and load some photographs as JPEG, at a quality from 95 down to 30."""
        chosen = self._chance(probability * (strength_B > 0.05), len(photos)).flatten() > 0
        quality_B = (95 - 65 * strength_B * self._uniform(len(photos))).long()
        if not chosen.any():
            return photos
        with ThreadPoolExecutor() as pool:
            files = pool.map(to_jpeg, photos[chosen].cpu(), quality_B[chosen].tolist())
            loaded = [to_tensor(Image.open(io.BytesIO(file))) for file in files]
        return photos.index_put((chosen,), torch.stack(loaded).to(self.device))


def take_photographs(
    drawings: Iterable[Image.Image], size_px: int, seed: int, *, quality: int | None = None
) -> list[bytes]:
    """Return a JPEG file of each RGBA drawing, photographed with a strength from 0.4 to 1.

    Without a `quality`, stronger photographs have a lower one.
    """
    photographer = Photographer(seed)
    drawings_B4HW = premultiply(torch.stack([to_tensor(drawing) for drawing in drawings]))
    strength_B = 0.4 + 0.6 * torch.rand(len(drawings_B4HW), generator=photographer.generator)
    photos = photographer.photograph(drawings_B4HW, size_px, strength_B)
    qualities = (95 - 60 * strength_B).int().tolist()
    return [to_jpeg(photo, quality or own) for photo, own in zip(photos, qualities, strict=True)]


def _is_black(drawings_B4HW: torch.Tensor) -> torch.Tensor:
    """Return `[B, 1, 1, 1]`: 1 for a drawing in one dark colour."""
    return (drawings_B4HW[:, :3].amax((1, 2, 3)) < 0.2).float()[:, None, None, None]


def _resized(images: torch.Tensor, size_px: int) -> torch.Tensor:
    return F.interpolate(images, (size_px, size_px), mode="bilinear", align_corners=False)


def premultiply(drawings_B4HW: torch.Tensor) -> torch.Tensor:
    """Multiply colours by alpha, so that resampling and blending leave no fringes."""
    alpha = drawings_B4HW[:, 3:]
    return torch.cat([drawings_B4HW[:, :3] * alpha, alpha], 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return a PIL image as float32 `[channels, H, W]` from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_jpeg(photo_3HW: torch.Tensor, quality: int) -> bytes:
    """Encode float32 `[3, H, W]` from 0 to 1 as JPEG."""
    pixels = (photo_3HW * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
