"""Random disturbances of a batch: uneven light, inverted parts, blur, noise, outlines and strokes across the digit.

What people's pictures suffer from, and more than that: a network trained on them reads by shape alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

BLUR_SIDE = 13  # pixels of the kernel that blurs
NUM_CORNERS = 7  # of a stroke


class RandomDisturbance(v2.Transform):
    """Disturb a share of the images of a batch, each by its own random draws.

    A disturbed image gets each of the six disturbances with a probability of a quarter, one after the other. The draws
    come from the default generator of the images' device, so the run's seed repeats them. Labels and other inputs pass
    through, as in any torchvision transform.

    Args:
        share: how many of the images are disturbed, in [0, 1].

    Raises:
        ValueError: ``share`` lies outside its range.
    """

    _transformed_types = (Tensor,)  # torchvision's hook: what to transform; anything else passes through

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; it is a fraction of the images, from 0 to 1")
        self.share = share

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Disturb images (B, 1, H, W), or a single one (1, H, W), uint8 or floating point in [0, 1]."""
        if self.share == 0:
            return inpt
        images = inpt if inpt.ndim == 4 else inpt[None]
        levels = images.float() if images.is_floating_point() else images.float() / 255
        is_chosen = _uniform(levels) < self.share
        for disturb in (outline, blur, scribble, invert, relight, add_noise):
            some = (is_chosen & (_uniform(levels) < 0.25)).flatten().nonzero()[:, 0]
            if len(some):
                levels = levels.index_copy(0, some, disturb(levels[some]))
        result = levels.to(images.dtype) if images.is_floating_point() else (levels * 255).round().to(images.dtype)
        wrapped: Tensor = tv_tensors.wrap(result if inpt.ndim == 4 else result[0], like=inpt)
        return wrapped


# --- the disturbances: images (B, 1, H, W) in [0, 1] to the same ------------------------------------------------------


def outline(images: Tensor) -> Tensor:
    """Only the rim of the ink: outside it, or outside and inside."""
    outside = F.max_pool2d(images, 3, 1, 1) - images
    inside = images + F.max_pool2d(-images, 3, 1, 1)
    rim = outside + torch.where(_uniform(images) < 0.5, inside, 0)
    return torch.where(_uniform(images) < 0.5, (rim > 0.5).float(), rim).clamp(0, 1)


def blur(images: Tensor) -> Tensor:
    """Blur, more in one direction than across it, after tearing neighbouring pixels apart."""
    num, _, height, width = images.shape
    pixel = torch.tensor([2 / width, 2 / height], device=images.device)
    identity = torch.eye(2, 3, device=images.device).expand(num, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    torn = F.grid_sample(images, grid + torch.randn_like(grid) * pixel * _uniform(images), align_corners=False)
    axis = torch.arange(BLUR_SIDE, device=images.device) - BLUR_SIDE // 2
    angle = _uniform(images) * math.pi
    along = axis * angle.cos() + axis[:, None] * angle.sin()  # (B, 1, 13, 13)
    across = axis[:, None] * angle.cos() - axis * angle.sin()
    long, short = 0.3 + 3.7 * _uniform(images) ** 2, 0.3 + 0.9 * _uniform(images)
    kernel = torch.exp(-((along / long) ** 2 + (across / short) ** 2) / 2)
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    return F.conv2d(torn.transpose(0, 1), kernel, padding=BLUR_SIDE // 2, groups=num).transpose(0, 1)


def scribble(images: Tensor) -> Tensor:
    """A thin stroke across the picture: straight, crooked, whole or broken."""
    num, _, height, width = images.shape
    size = torch.tensor([width, height], device=images.device)
    ends = torch.rand(num, 2, 2, device=images.device) * size
    parts = torch.linspace(0, 1, NUM_CORNERS, device=images.device)[:, None]
    crooked = torch.randn(num, NUM_CORNERS, 2, device=images.device) * 3 * _uniform(images)[:, 0]
    corners = torch.lerp(ends[:, :1], ends[:, 1:], parts) + crooked
    row, column = torch.meshgrid(
        torch.arange(height, device=images.device), torch.arange(width, device=images.device), indexing="ij"
    )
    pixels = torch.stack([column, row], dim=2).reshape(1, 1, -1, 2).float()
    start, step = corners[:, :-1, None], corners.diff(dim=1)[:, :, None]  # (B, S, 1, 2)
    place = (((pixels - start) * step).sum(3) / (step**2).sum(3).clamp(min=1e-6)).clamp(0, 1)  # (B, S, H * W)
    distance = (start + place[..., None] * step - pixels).norm(dim=3)
    is_drawn = torch.rand(num, NUM_CORNERS - 1, 1, device=images.device) < 1 - 0.6 * _uniform(images)[:, 0]
    ink = ((1.7 - distance).clamp(0, 1) * is_drawn).amax(1).reshape(images.shape)
    return torch.maximum(images, ink * (0.5 + 0.5 * _uniform(images)))


def invert(images: Tensor) -> Tensor:
    """Dark for bright inside a rectangle, or outside it."""
    inside = torch.ones_like(images, dtype=torch.bool)
    for length, shape in ((images.shape[2], (1, 1, -1, 1)), (images.shape[3], (1, 1, 1, -1))):
        low = (_uniform(images) * 2 - 1) * length  # half of them reach the edge
        high = (_uniform(images) * 2) * length
        axis = torch.arange(length, device=images.device).reshape(shape)
        inside = inside & (axis >= torch.minimum(low, high)) & (axis < torch.maximum(low, high))
    return torch.where(inside ^ (_uniform(images) < 0.5), 1 - images, images)


def relight(images: Tensor) -> Tensor:
    """Paler, under a smooth veil of any brightness."""
    veil = F.interpolate(torch.rand(len(images), 1, 4, 4, device=images.device), list(images.shape[2:]), mode="bicubic")
    veil = (_uniform(images) + (veil - 0.5) * _uniform(images)).clamp(0, 1)
    return torch.lerp(veil, images, 0.15 + 0.85 * _uniform(images))


def add_noise(images: Tensor) -> Tensor:
    """Grain, and pixels that are black or white."""
    noisy = images + torch.randn_like(images) * 0.3 * _uniform(images) ** 2
    is_spoiled = torch.rand_like(images) < 0.25 * _uniform(images) ** 2
    return torch.where(is_spoiled, torch.rand_like(images).round(), noisy).clamp(0, 1)


def _uniform(images: Tensor) -> Tensor:
    """One number in [0, 1) for each image: (B, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, device=images.device)
