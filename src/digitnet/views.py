"""What a network sees of images: digits set upright, seen from nearer. Steps without parameters.

A view, ``see_...``, takes images (B, 1, 28, 28), floating point in [0, 1], and whether this is training, in which some
are drawn anew each time; it returns (B, 1, 28, 28).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SLANT = 0.7  # tangent of 35 degrees; what leans more is hardly a digit's slant
SLANT_JITTER = 0.2  # tangent of 11 degrees
NEAR, NEAR_TRAINED = 24, 25  # pixels across that zoom_in enlarges to 28; of what is trained on, turning takes some more
MAX_ANGLE_DEG = 10.0


def see_all(images: Tensor, training: bool) -> Tensor:
    """The images as they are."""
    return images


def see_upright(images: Tensor, training: bool) -> Tensor:
    """Set upright, the middle 24.5x24.5 pixels enlarged to 28x28, of mean 0 and variance 1; slant in training drawn."""
    x = F.interpolate(set_upright(images, training), size=(32, 32), mode="bilinear")[..., 2:-2, 2:-2]
    return F.layer_norm(x, x.shape[1:])


def see_near(images: Tensor, training: bool) -> Tensor:
    """Set upright and enlarged further, each of mean 0 and variance 1; how, in training, is drawn."""
    return zoom_in(set_upright(images, training), training)


def set_upright(images: Tensor, training: bool) -> Tensor:
    """Deslant images (B, 1, H, W), floating point, ink bright on a paper of 0.

    In training, each gets a random slant of up to SLANT_JITTER either way: augmentation that slants or turns them
    before would be undone.
    """
    if not training:
        return deslant(images)
    return deslant(images, SLANT_JITTER * torch.empty(len(images), 1, device=images.device).uniform_(-1, 1))


def deslant(images: Tensor, jitter: Tensor | None = None) -> Tensor:
    """Shift the rows of each image against each other until its ink leans to neither side.

    The slant is the slope of the line of least squares that tells an ink's column from its row; the image is sheared
    about its centre of mass, by one bilinear resampling. Pixels from outside the image are paper.

    Args:
        images: (B, 1, H, W), floating point, ink bright on a paper of 0.
        jitter: (B, 1), the slant that each image is given instead of none, in columns to the right per row down.

    Returns:
        (B, 1, H, W) of the dtype given. An image without ink comes back as it is.
    """
    # All of it in float32, and so without matrix products, which mixed precision would make in half precision: that
    # cannot say well enough where a pixel comes from.
    ink = images.float()[:, 0]  # (B, H, W)
    height, width = ink.shape[1:]
    rows, columns = (torch.arange(n, device=ink.device).float() - (n - 1) / 2 for n in (height, width))  # 0 at middle
    weights = ink / ink.sum(dim=(1, 2), keepdim=True).clamp_min(1e-3)  # (B, H, W), of sum 1
    of_rows, of_columns = weights.sum(dim=2), (weights * columns).sum(dim=2)  # (B, H) each
    row = (of_rows * rows).sum(dim=1, keepdim=True)  # (B, 1), of the centre of mass
    from_row = rows - row  # (B, H)
    spread = (of_rows * from_row.square()).sum(dim=1, keepdim=True).clamp_min(1e-3)
    slant = (of_columns * from_row).sum(dim=1, keepdim=True) / spread  # (B, 1), columns to the right per row down
    slant = slant.clamp(-MAX_SLANT, MAX_SLANT) - (0 if jitter is None else jitter.float())

    across = columns + (slant * from_row)[:, :, None]  # (B, H, W), where a pixel comes from
    down = rows[:, None].expand_as(across)
    grid = torch.stack([across * (2 / width), down * (2 / height)], dim=-1)  # -1 to 1 across the image
    upright = F.grid_sample(ink[:, None], grid, align_corners=False)
    return upright.to(images.dtype)


def zoom_in(images: Tensor, training: bool) -> Tensor:
    """The middle 24x24 pixels of each image, enlarged to 28x28, of mean 0 and variance 1.

    In training each image is seen in its own way: 25x25 pixels, up to 1.5 off the middle either way; turned by up to
    10 degrees, and enlarged so far that no corner shows, by up to 16 %; and bent, each of the nine inner nodes of a
    grid of 4x4 meshes pulled by -1, 0 or 1 pixel along each axis. So digits are from 4 % smaller to 11 % larger than
    those read later: the size that counts lies inside what was learned on.

    Source: the augmentation of github.com/ttdoucet/mnist, whose cut of the middle 25 pixels is rounded to 24, and whose
    rotation enlarges; differs from it: one resampling instead of three.

    Args:
        images: (B, 1, 28, 28), floating point in [0, 1].
        training: whether to draw; from the default generator of the images' device.

    Returns:
        (B, 1, 28, 28), of the dtype given.
    """
    num, side = images.shape[0], images.shape[-1]
    # In float32 whatever the default is: half precision cannot say well enough where a pixel comes from.
    exact: dict[str, Any] = {"device": images.device, "dtype": torch.float32}
    axis = torch.arange(side, **exact) - (side - 1) / 2  # 0 at the middle
    x, y = axis.expand(num, side, side), axis[:, None].expand(num, side, side)  # where each pixel comes from
    if training:
        angle = torch.empty(num, 1, 1, **exact).uniform_(-1, 1) * (MAX_ANGLE_DEG * math.pi / 180)
        enlargement = angle.cos() + angle.sin().abs()  # of a square, turned, until it covers itself
        cos, sin = angle.cos() / enlargement, angle.sin() / enlargement
        x, y = cos * x - sin * y, sin * x + cos * y
        nodes = torch.zeros(num, 2, 5, 5, **exact)
        nodes[:, :, 1:-1, 1:-1] = torch.randint(-1, 2, (num, 2, 3, 3), device=images.device).float()
        bend = F.grid_sample(nodes, torch.stack([x, y], dim=-1) * (2 / side), align_corners=True)  # (B, 2, 28, 28)
        x, y = x + bend[:, 0], y + bend[:, 1]
    scale = (NEAR_TRAINED if training else NEAR) / side
    x, y = x * scale, y * scale
    if training:
        shift = torch.randint(0, 4, (2, num, 1, 1), device=images.device).float() - 1.5
        x, y = x + shift[0], y + shift[1]
    grid = torch.stack([x, y], dim=-1) * (2 / side)  # -1 to 1 across the image
    near = F.grid_sample(images.float(), grid, mode="bicubic", align_corners=False).clamp(0, 1)  # it overshoots
    return F.layer_norm(near, near.shape[1:]).to(images.dtype)
