"""Random augmentation of a batch, one draw per image, on the batch's own device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from digitnet.errors import to_one_line

Augmentation = Callable[[Tensor], Tensor]

NUM_NODES = 5  # of the lattice that bends an image, along each axis


def affine(
    images: Tensor,
    angle_deg: Tensor,
    shift_frac: Tensor,
    zoom: Tensor | None = None,
    shear: Tensor | None = None,
    bend: Tensor | None = None,
) -> Tensor:
    """Slant each image, zoom into it and rotate it about its centre, shift it, and bend it: one bilinear resampling.

    Pixels from outside the image repeat the nearest edge pixel (Keras' ``fill_mode="nearest"``).

    Args:
        images: (B, C, H, W), uint8 in [0, 255] or floating point of any range.
        angle_deg: (B,) angles in degrees, counter-clockwise as one looks at the image.
        shift_frac: (B, 2) shifts down and to the right, as fractions of height and width.
        zoom: (B,) factors, above 1 for larger; none by default.
        shear: (B,) tangents of the angle by which upright lines lean, their tops to the right where positive;
            none by default.
        bend: (B, H, W, 2), how far to the right and down each pixel is fetched from, in pixels; none by default.

    Returns:
        (B, C, H, W) of the dtype given; uint8 is rounded to the nearest level.
    """
    height, width = images.shape[-2:]
    cos, sin = torch.cos(angle_deg * (math.pi / 180)), torch.sin(angle_deg * (math.pi / 180))
    if zoom is not None:
        cos, sin = cos / zoom, sin / zoom
    # affine_grid asks where each output pixel comes from, in coordinates that run from -1 to 1 across the image: undo
    # the shift, then undo the rotation and the zoom. Width over height keeps a rotation a rotation on oblong images.
    down, right = (2 * shift_frac).unbind(1)
    xx, xy = cos, -sin * (height / width)
    yx, yy = sin * (width / height), cos
    if shear is not None:
        slant = shear * (height / width)
        xy, yy = xy + slant * xx, yy + slant * yx
    rows = [xx, xy, -(xx * right + xy * down), yx, yy, -(yx * right + yy * down)]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (B, H, W, 2)
    if bend is not None:
        grid = grid + bend * torch.tensor([2 / width, 2 / height], device=grid.device)
    # In float32 whatever the dtype: half precision cannot say well enough where a pixel comes from.
    warped = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return warped.to(images.dtype) if images.is_floating_point() else warped.round_().to(images.dtype)


class RandomAffine(v2.Transform):
    """Rotate, shift and scale each image of a batch by its own random amounts.

    Uniform draws: the angle from +-``rotation_deg``, the shifts down and to the right independently from
    +-``shift_frac``, the enlargement from +-``scale_frac``. The draws come from the default generator of the images'
    device, so the run's seed repeats them. Labels and other inputs pass through, as in any torchvision transform. With
    all strengths zero, the images come back unchanged.

    Differs from ``torchvision.transforms.v2.RandomAffine``: that one draws once per call, so a whole batch moves alike.
    Source: the write-up's Keras layers RandomRotation(0.05, fill_mode="nearest"), a twentieth of a turn, and
    RandomTranslation(0.1, 0.1, fill_mode="nearest"); differs from Keras: one resampling for both instead of two.

    Args:
        rotation_deg: largest rotation either way, in degrees, in [0, 180].
        shift_frac: largest shift either way, as a fraction of the image's height and width, in [0, 1].
        scale_frac: largest enlargement or reduction, as a fraction of the size, in [0, 1); not in the write-up.

    Raises:
        ValueError: when a strength lies outside its range.
    """

    _transformed_types = (Tensor,)  # torchvision's hook: what to transform; anything else passes through

    def __init__(self, rotation_deg: float = 18.0, shift_frac: float = 0.1, scale_frac: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rotation_deg <= 180:
            raise ValueError(f"rotation_deg is {rotation_deg}; it is the largest angle in degrees, from 0 to 180")
        if not 0 <= shift_frac <= 1:
            raise ValueError(f"shift_frac is {shift_frac}; it is the largest shift as a fraction, from 0 to 1")
        if not 0 <= scale_frac < 1:
            raise ValueError(f"scale_frac is {scale_frac}; it is the largest change of size as a fraction, in [0, 1)")
        self.rotation_deg = rotation_deg
        self.shift_frac = shift_frac
        self.scale_frac = scale_frac
        self._is_idle = rotation_deg == shift_frac == scale_frac == 0

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Draw the angle, the shifts and the zoom of each image of the batch."""
        if not flat_inputs:
            raise TypeError("RandomAffine got no image tensor; put v2.ToImage() before it to make one of a PIL image")
        images = flat_inputs[0]
        batch_size = images.shape[0] if images.ndim == 4 else 1
        draws = torch.empty(3, batch_size, device=images.device).uniform_(-1, 1)
        params = {"angle_deg": draws[0] * self.rotation_deg, "shift_frac": draws[1:].T * self.shift_frac}
        if self.scale_frac:
            params["zoom"] = 1 + torch.empty_like(draws[0]).uniform_(-1, 1) * self.scale_frac
        return params

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Apply the drawn parameters to images (B, C, H, W), or to a single one (C, H, W)."""
        if self._is_idle:
            return inpt
        warped = affine(inpt, **params) if inpt.ndim == 4 else affine(inpt[None], **params)[0]
        result: Tensor = tv_tensors.wrap(warped, like=inpt)  # an Image stays an Image
        return result


class RandomWarp(RandomAffine):
    """RandomAffine that also slants each image and bends it as if drawn on rubber, still in one resampling.

    Draws beside those of RandomAffine: the angle of the slant, uniform from +-``shear_deg``, and for each node of a
    5x5 lattice over the image how far it is pulled, normal along each axis; pixels between nodes follow smoothly.

    Source: Simard, Steinkraus and Platt 2003, Best Practices for Convolutional Neural Networks; differs from it: a
    lattice and bicubic interpolation in place of a field of noise smoothed by a Gaussian.

    Args:
        rotation_deg: largest rotation either way, in degrees, in [0, 180].
        shift_frac: largest shift either way, as a fraction of the image's height and width, in [0, 1].
        scale_frac: largest enlargement or reduction, as a fraction of the size, in [0, 1).
        shear_deg: largest slant either way, in degrees, in [0, 60].
        elastic_px: standard deviation of a node's displacement along each axis, in pixels, 0 or more.

    Raises:
        ValueError: when a strength lies outside its range.
    """

    def __init__(
        self,
        rotation_deg: float = 8.0,
        shift_frac: float = 0.05,
        scale_frac: float = 0.08,
        shear_deg: float = 4.0,
        elastic_px: float = 0.35,
    ) -> None:
        super().__init__(rotation_deg, shift_frac, scale_frac)
        if not 0 <= shear_deg <= 60:
            raise ValueError(f"shear_deg is {shear_deg}; it is the largest slant in degrees, from 0 to 60")
        if not 0 <= elastic_px < math.inf:
            raise ValueError(f"elastic_px is {elastic_px}; it is a displacement in pixels, 0 or more")
        self.shear_deg = shear_deg
        self.elastic_px = elastic_px
        self._is_idle = self._is_idle and shear_deg == elastic_px == 0

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Draw what RandomAffine draws, and the slant and the bending of each image of the batch."""
        params = super().make_params(flat_inputs)
        height, width = flat_inputs[0].shape[-2:]
        angle = params["angle_deg"]
        if self.shear_deg:
            params["shear"] = torch.tan(torch.empty_like(angle).uniform_(-1, 1) * (self.shear_deg * math.pi / 180))
        if self.elastic_px:
            pulls = torch.randn(len(angle), 2, NUM_NODES, NUM_NODES, device=angle.device) * self.elastic_px
            down, along = (interpolation_matrix(length).to(angle.device) for length in (height, width))
            params["bend"] = (down @ pulls @ along.T).permute(0, 2, 3, 1)  # (B, H, W, 2)
        return params


@cache
def interpolation_matrix(length: int) -> Tensor:
    """(length, NUM_NODES): from values at nodes, the first and last at the ends, to each place between, bicubic."""
    nodes = torch.eye(NUM_NODES)[None, None]
    return F.interpolate(nodes, (length, NUM_NODES), mode="bicubic", align_corners=True)[0, 0]


def verify_augmentation(augmentation: Augmentation, images: Tensor) -> None:
    """Refuse what training could not use, by a draw for a few images.

    Torch's generators are left as they were, but for that of a Mac's GPU.

    Args:
        augmentation: from images (B, 1, 28, 28) uint8 to images; uint8, or float32 in [0, 1].
        images: (B, 1, 28, 28) uint8, on the device that will train.

    Raises:
        ValueError: it fails, or gives another shape, another dtype, or levels on another scale.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            augmented = augmentation(images.clone())  # some work in place
        shape, dtype = tuple(augmented.shape), augmented.dtype
    except Exception as error:  # any class, any argument
        raise ValueError(f"data.augmentation fails on uint8 images: {to_one_line(str(error))}") from error
    if shape != tuple(images.shape):
        raise ValueError(f"data.augmentation turned images {tuple(images.shape)} into {shape}; the shape must stay")
    if dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"data.augmentation gives images of {dtype}; they must be torch.uint8 or torch.float32")
    low, high = augmented.min().item(), augmented.max().item()
    if dtype == torch.float32 and not (low > -1 and high < 2):  # noise and bicubic filters overshoot
        raise ValueError(
            f"data.augmentation gives float32 levels from {low:.3g} to {high:.3g}; they must lie in [0, 1], as those "
            "that are validated do"
        )


def preview_augmentation(augmentation: Augmentation, originals: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """Augment each image several times, all in one batch, as in training.

    Args:
        augmentation: from images (B, 1, 28, 28) uint8 to images; uint8, or floating point in [0, 1].
        originals: (R, 28, 28) uint8.
        num_draws: D, draws of each.
        seed: of the draws; the generators of the caller are left as they were.

    Returns:
        (R, D, 28, 28), levels in [0, 255].

    Raises:
        ValueError: training could not use what comes back.
    """
    batch = torch.from_numpy(originals).repeat_interleave(num_draws, dim=0)[:, None]  # (R * D, 1, 28, 28)
    verify_augmentation(augmentation, batch[:8])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        augmented = augmentation(batch)
    levels = augmented * 255 if augmented.is_floating_point() else augmented
    preview: np.ndarray = levels.numpy().reshape(len(originals), num_draws, *originals.shape[1:])
    return preview
