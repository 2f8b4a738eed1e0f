"""Pictures that are almost digits: what a detector of non-digits learns from.

Digits turned, mirrored, cut up and mixed; letters; random pen strokes, polygons, stars and crosses; noise, clouds and
paper. All but the last lie in the 20x20 box that MNIST gives a digit, as that is where a picture's ink is put.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BOX, SIDE = 20, 28  # MNIST: a digit fits in BOX x BOX, its centre of mass in the middle of SIDE x SIDE
CHUNK = 100  # images at once where more would take hundreds of megabytes
CORNERS = (3, 4, 5, 6, 8, 10, 12)  # of polygons and stars
FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "cmmi10")
LETTERS = "ABCDEFGHJKMNPQRTUVWXYacdefhkmnprtuvwxy"
NUM_POINTS = 300  # along the strokes of a drawing
# Strokes and the points that each goes through: letter-like signs, hooks, scribbles.
STROKES = ((2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (3, 3), (1, 6), (1, 9), (1, 14))


def make_near_misses(images: Tensor, labels: Tensor, generator: torch.Generator, num: int) -> Tensor:
    """Make pictures that are no digits, save by accident.

    Args:
        images: digits (N, 1, 28, 28), floating point in [0, 1], on the CPU.
        labels: (N,) int64.
        generator: what everything random is drawn from.
        num: how many pictures.

    Returns:
        (num, 1, 28, 28) in [0, 1], kind after kind: changed digits, letters, drawings, and paper.
    """
    shares = [round(num * share) for share in (0.3, 0.15, 0.43)]
    some = torch.randperm(len(images), generator=generator)[: max(40, num // 8)]  # two or three of each
    kinds = [
        place(torch.cat(_change_digits(images[some], labels[some], generator))),
        place(draw_letters()),
        torch.cat(_draw(max(1, num // 24), generator)),
    ]
    num_paper = num - sum(shares)
    paper = [1 - images[torch.randint(len(images), (num_paper // 3,), generator=generator)]]
    paper.append(draw_noise(num_paper - num_paper // 3, generator))
    picked = [
        kind[torch.randint(len(kind), (share,), generator=generator)] for kind, share in zip(kinds, shares, strict=True)
    ]
    return torch.cat([*picked, *paper])


def _change_digits(images: Tensor, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    def pick(digits: tuple[int, ...]) -> Tensor:
        return images[torch.isin(labels, torch.tensor(digits))]

    quarter = pick((1, 2, 3, 4, 5, 6, 7, 8, 9)).rot90(1, (2, 3))
    flip = _uniform(len(quarter), generator) < 0.5
    quarter = torch.where(flip, quarter.flip((2, 3)), quarter)

    cut = pick((0, 2, 3, 4, 5, 6, 7, 8, 9))[:, :, 4:24, 4:24]
    blocks = cut.unfold(2, 10, 10).unfold(3, 10, 10).reshape(len(cut), 4, 10, 10)
    orders = torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1], [3, 0, 1, 2]])
    orders = orders[torch.randint(len(orders), (len(cut),), generator=generator)]
    blocks = blocks.gather(1, orders[:, :, None, None].expand(-1, -1, 10, 10)).reshape(-1, 2, 2, 10, 10)
    shuffled = F.pad(blocks.transpose(2, 3).reshape(-1, 1, BOX, BOX), (4, 4, 4, 4))

    others = torch.randperm(len(images), generator=generator)
    mixed = (labels != labels[others]) & (labels != 1) & (labels[others] != 1)
    narrow = F.interpolate(images, (28, 14), mode="area")
    return [
        pick((2, 3, 4, 5, 7)).rot90(2, (2, 3)),  # of the others, half a turn makes a digit
        pick((3, 4, 6, 7, 9)).flip(3),
        quarter[::2],
        shuffled[::2],
        torch.maximum(images, images[others])[mixed][::2],
        torch.cat([narrow, narrow[others]], 3)[::4],
    ]


def _draw(num: int, generator: torch.Generator) -> list[Tensor]:
    drawn, filled = [], []
    for num_strokes, num_corners in STROKES:
        corners = torch.rand(num, num_strokes, num_corners, 2, generator=generator)
        if num_corners < 5:
            corners = (2 * corners).round() / 2 + (corners - 0.5) / 4  # near a 3x3 grid, as the corners of letters
        drawn.append(draw_strokes(corners, generator))
    for num_corners in CORNERS:
        turn, rough = torch.rand(2, num, 1, generator=generator)
        angles = 2 * torch.pi * (torch.arange(num_corners) / num_corners + turn)
        radii = 1 - rough**2 * torch.rand(num, num_corners, generator=generator)
        if num_corners % 2 == 0:  # half of them stars
            radii[::2, ::2] *= 0.3 + 0.3 * torch.rand(len(radii[::2]), 1, generator=generator)
        corners = torch.stack([radii * angles.cos(), radii * angles.sin()], 2)
        filled.append(draw_polygons(corners))
        if num_corners in (3, 4):  # the outline of more corners is a 0, save a star's
            drawn.append(draw_strokes(torch.cat([corners, corners[:, :1]], 1)[:, None], generator))
        elif num_corners % 2 == 0:
            drawn.append(draw_strokes(torch.cat([corners, corners[:, :1]], 1)[::2, None], generator))
    turn, bend = torch.rand(2, num, 1, generator=generator)
    angles = 2 * torch.pi * turn + torch.pi * torch.tensor([0, 0.5]) * (0.7 + 0.6 * bend)
    arms = torch.stack([angles.cos(), angles.sin()], 2)[:, :, None]  # (num, 2, 1, 2)
    crosses = draw_strokes(torch.cat([-arms, arms], 2), generator)
    polygons = place(torch.cat(filled))
    small = [shrink(polygons, side) for side in (14, 18)]  # as what is thinned gets smaller
    return [place(torch.cat([*drawn, crosses])), polygons, *small]


def draw_letters() -> Tensor:
    """The capital and small letters that look like no digit, in some of the fonts that come with matplotlib."""
    drawn = []
    for name in FONTS:
        font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), 80)
        for letter in LETTERS:
            page = Image.new("L", (112, 112))  # four times as large
            ImageDraw.Draw(page).text((56, 56), letter, 255, font, anchor="mm")
            drawn.append(np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return torch.from_numpy(np.array(drawn))[:, None].float() / 255


def draw_strokes(corners: Tensor, generator: torch.Generator) -> Tensor:
    """Draw pen strokes, straight or rounded, thin to thick, as MNIST would hold them.

    Args:
        corners: (N, S, P, 2), the P points that each of S strokes goes through, in any unit.
        generator: decides how round and how thick.

    Returns:
        (N, 1, 28, 28) in [0, 1].
    """
    num, num_strokes, num_corners, _ = corners.shape
    times = torch.linspace(0, num_corners - 1, NUM_POINTS // num_strokes)
    left = times.long().clamp(max=num_corners - 2)
    paths = torch.lerp(corners[:, :, left], corners[:, :, left + 1], (times - left)[:, None])  # (N, S, T, 2)
    width = 2 * (len(times) // (2 * num_corners)) + 1
    smooth = F.avg_pool1d(paths.transpose(2, 3).flatten(0, 1), width, 1, width // 2, count_include_pad=False)
    smooth = smooth.reshape(num, num_strokes, 2, -1).transpose(2, 3)
    points = torch.where(_uniform(num, generator) < 0.6, smooth, paths).flatten(1, 2)  # (N, S * T, 2)
    points = _fit(points)
    low, part = points.long(), points.frac()
    ink = torch.zeros(num, SIDE * SIDE)
    for dy in (0, 1):
        for dx in (0, 1):
            share = (part[..., 0] if dy else 1 - part[..., 0]) * (part[..., 1] if dx else 1 - part[..., 1])
            ink.scatter_add_(1, (low[..., 0] + dy) * SIDE + low[..., 1] + dx, share)
    line = 1 - torch.exp(-2 * ink).reshape(num, 1, SIDE, SIDE)
    gain = 1.5 + 2.5 * _uniform(num, generator)
    return (gain * blur(line, 0.6 + 0.6 * _uniform(num, generator).flatten())).clamp(max=1)


def draw_polygons(corners: Tensor) -> Tensor:
    """Fill polygons by the even-odd rule: corners (N, P, 2) in any unit to images (N, 1, 28, 28) in [0, 1]."""
    if len(corners) > CHUNK:
        return torch.cat([draw_polygons(part) for part in corners.split(CHUNK)])
    first = _fit(corners)[:, None]  # (N, 1, P, 2)
    second = first.roll(1, 2)
    grid = torch.arange(0.25, SIDE, 0.5) - 0.5  # four points a pixel
    y, x = (axis.reshape(1, -1, 1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    (y1, x1), (y2, x2) = first.unbind(3), second.unbind(3)
    is_crossed = ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1 + 1e-9))
    inside = (is_crossed.sum(2) % 2).float().reshape(-1, 1, 2 * SIDE, 2 * SIDE)
    return F.avg_pool2d(inside, 2)


def draw_noise(num: int, generator: torch.Generator) -> Tensor:
    """Grain, clouds or blots of any size and contrast on paper of any grey: (num, 1, 28, 28) in [0, 1]."""
    cloud = blur(
        torch.randn(num, 1, SIDE, SIDE, generator=generator), 0.05 + 4 * _uniform(num, generator).flatten() ** 2
    )
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    cloud = (cloud - low) / (high - low)
    blots = (cloud > 0.3 + 0.5 * _uniform(num, generator)).float()
    image = torch.where(_uniform(num, generator) < 0.5, cloud, blots) * _uniform(num, generator) ** 2
    grey = _uniform(num, generator) * (_uniform(num, generator) < 0.5)
    return (image + grey).clamp(max=1)


def shrink(images: Tensor, side: int) -> Tensor:
    """Images (N, 1, 28, 28) at ``side`` pixels in the middle of 28."""
    before, after = (SIDE - side) // 2, (SIDE - side + 1) // 2
    return F.pad(F.interpolate(images, (side, side), mode="area"), (before, after, before, after))


def place(images: Tensor) -> Tensor:
    """Scale and shift images (N, 1, 28, 28) in [0, 1] so that their ink lies where MNIST has a digit's."""
    if len(images) > CHUNK:
        return torch.cat([place(part) for part in images.split(CHUNK)])
    ink = images - images.amin((2, 3), keepdim=True)
    mask = ink > 0.1 * ink.amax((2, 3), keepdim=True)  # (N, 1, 28, 28)
    axis = torch.arange(SIDE, dtype=torch.float32)
    lengths, centres = [], []
    for dim in (2, 3):  # columns, then rows: (N, 28), is there ink
        some = mask.any(dim)[:, 0]
        low = torch.where(some, axis, SIDE).amin(1)
        high = torch.where(some, axis, -1).amax(1)
        mass = ink.sum(dim)[:, 0]
        lengths.append(high - low + 1)
        centres.append((mass * axis).sum(1) / mass.sum(1).clamp(min=1e-6))
    scale = torch.stack(lengths).amax(0).clamp(min=1) / BOX
    # MNIST's centre of mass is in the middle of the 15th pixel; affine_grid counts from -1 to 1.
    shifts = [(centre + 0.5) / (SIDE / 2) - 1 - scale * (14.5 / (SIDE / 2) - 1) for centre in centres]
    zero = torch.zeros_like(scale)
    theta = torch.stack([scale, zero, shifts[0], zero, scale, shifts[1]], 1).view(-1, 2, 3)
    return F.grid_sample(ink, F.affine_grid(theta, list(ink.shape), align_corners=False), align_corners=False)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (N, 1, H, W) with a Gaussian of its own width: sigma (N,), in pixels."""
    if not len(sigma):
        return images  # a convolution of no groups is none
    kernel = torch.exp(-((torch.arange(-7.0, 8.0) / sigma[:, None]) ** 2) / 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None, :, None]  # (N, 1, 15, 1)
    images = F.conv2d(images.transpose(0, 1), kernel, padding=(7, 0), groups=len(sigma))
    return F.conv2d(images, kernel.transpose(2, 3), padding=(0, 7), groups=len(sigma)).transpose(0, 1)


def _fit(points: Tensor) -> Tensor:
    """Scale points (N, T, 2) as MNIST scales ink: the longer side is BOX, the centre of mass in the middle."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    scale = (BOX - 3) / (high - low).amax(2, keepdim=True).clamp(min=1e-6)  # a stroke is about 3 wide
    points, middle = (points - (low + high) / 2) * scale, (points.mean(1, keepdim=True) - (low + high) / 2) * scale
    return points - middle.clamp(-4, 4) + (SIDE - 1) / 2


def _uniform(num: int, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) for each image: (num, 1, 1, 1)."""
    return torch.rand(num, 1, 1, 1, generator=generator)
