"""3x3 convolutions with a quarter of the multiplications: Winograd's, for float32 on a CPU.

A convolution cuts its input into overlapping tiles, transforms tiles and kernels, multiplies them point by point, and
transforms back. A tile of 5x5 results takes 49 multiplications where the sum itself takes 225. The values are the same
but for rounding, which is about twenty times that of the plain sum. What is left is matrix products, which any
processor does well; oneDNN, PyTorch's library on x86, has no such kernel of its own for float32.

Source: Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308; the gradients are
those of its formula, transform by transform.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial.polynomial import polyfromroots
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_BATCH, MAX_BATCH = 32, 256  # to score: with fewer images the kernels cost too much, with more the memory
POINTS = (0, 1, -1, 2, -2, 0.5)  # where polynomials are evaluated, and infinity; simple numbers round least
TILES = (5, 4, 3, 2)  # results along each axis; of 6 nothing is gained, of 7 rounding is seven times that of 5


@cache
def make_transforms(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three transforms of Winograd's F(tile x tile, 3x3), on flattened squares, float32; n is tile + 2.

    Results are ``output @ ((kernel @ kernels) * (input @ inputs))``: a convolution along one axis is a product of
    polynomials, evaluated at n points and interpolated (Toom and Cook); along two, the Kronecker square of it.

    Args:
        tile: results of a tile along each axis, 1 to 5.

    Returns:
        ``input`` (n * n, n * n), ``kernel`` (n * n, 9), ``output`` (tile * tile, n * n).
    """
    points = torch.tensor(POINTS[: tile + 1], dtype=torch.float64)
    powers = points[:, None] ** torch.arange(max(tile, 3))  # (tile + 1, ...)
    differences = points[:, None] - points + torch.eye(tile + 1)  # 1 where a point meets itself
    kernel = torch.cat([powers[:, :3] / differences.prod(dim=1)[:, None], torch.eye(3)[2:]])
    output = torch.cat([powers[:, :tile], torch.eye(tile)[-1:]]).T
    roots = [np.delete(points.numpy(), i) for i in range(tile + 1)]  # all points but one
    polynomials = [F.pad(torch.from_numpy(polyfromroots(each)), (0, 1)) for each in roots]
    polynomials.append(torch.from_numpy(polyfromroots(points.numpy())))
    squares = [torch.kron(one, one).float() for one in (torch.stack(polynomials), kernel, output.contiguous())]
    return squares[0], squares[1], squares[2]


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with a border of zeros, computed in Winograd's way where that is the faster one.

    That is in float32 on a CPU, in training and for batches of 32 to 256 images to be scored; everywhere else, and when
    its graph is exported, it is a plain nn.Conv2d.

    Args:
        in_channels: of the images.
        out_channels: of the results.
        pooled: whether a 2x2 pooling follows. It leaves an odd last row and column out, so these need not be computed.
    """

    def __init__(self, in_channels: int, out_channels: int, pooled: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        self.pooled = pooled

    def forward(self, images: Tensor) -> Tensor:
        """Results (B, O, H, W) of images (B, C, H, W); of a pooled one, perhaps without an odd last row and column."""
        if not self._pays(images):
            return super().forward(images)
        height, width = images.shape[2:]
        if self.pooled:
            height, width = height - height % 2, width - width % 2
        results: Tensor = WinogradFunction.apply(images, self.weight, self.bias, height, width)
        return results

    def _pays(self, images: Tensor) -> bool:
        """Whether Winograd's way is the faster one for these images."""
        if torch.compiler.is_exporting() or images.device.type != "cpu" or images.dtype != torch.float32:
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled():
            return self.training
        return MIN_BATCH <= len(images) <= MAX_BATCH


class WinogradFunction(torch.autograd.Function):
    """The first ``height`` rows and ``width`` columns of ``F.conv2d(images, weight, bias, padding=1)``, float32.

    Tiles come first and channels last, so that each tile is transformed while it is in the processor's cache. The
    results are a view, which autograd does not let one change in place; there is no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
        tile = choose_tile(height, width)
        n, rows, columns = tile + 2, math.ceil(height / tile), math.ceil(width / tile)
        to_input, to_kernel, to_output = make_transforms(tile)
        num, channels, *size = images.shape
        num_out = len(weight)
        padded = images.new_zeros(num, rows * tile + 2, columns * tile + 2, channels)
        inside = (slice(None), slice(1, size[0] + 1), slice(1, size[1] + 1))
        padded[inside] = images.permute(0, 2, 3, 1)[:, : rows * tile + 1, : columns * tile + 1]
        tiles = padded.unfold(1, n, tile).unfold(2, n, tile).permute(0, 1, 2, 4, 5, 3)  # (B, rows, columns, n, n, C)
        inputs = to_input @ tiles.reshape(-1, n * n, channels)  # (P, n * n, C)
        # Channels last here, too, as in the weights: then only whole rows of them are moved, to here and back.
        kernels = (to_kernel @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(n * n, num_out, channels)
        products = torch.bmm(inputs.transpose(0, 1), kernels.transpose(1, 2))  # (n * n, P, O)
        results = (to_output @ products.view(n * n, -1)).view(tile, tile, num, rows, columns, num_out)
        results = results.permute(2, 3, 0, 4, 1, 5).reshape(num, rows * tile, columns * tile, num_out)
        ctx.save_for_backward(inputs, kernels)
        ctx.sizes = (num, rows, columns, tile, size)
        results = results[:, :height, :width].permute(0, 3, 1, 2)
        return results if bias is None else results.add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kernels = ctx.saved_tensors
        num, rows, columns, tile, size = ctx.sizes
        n, num_out, channels = tile + 2, kernels.shape[1], kernels.shape[2]
        to_input, to_kernel, to_output = make_transforms(tile)
        d_results = gradients[0].permute(0, 2, 3, 1)  # (B, height, width, O)
        d_bias = d_results.sum((0, 1, 2)) if ctx.needs_input_grad[2] else None
        d_results = F.pad(
            d_results, (0, 0, 0, columns * tile - d_results.shape[2], 0, rows * tile - d_results.shape[1])
        )
        d_results = d_results.reshape(num, rows, tile, columns, tile, num_out).permute(0, 1, 3, 2, 4, 5)
        d_products = (to_output.T @ d_results.reshape(-1, tile * tile, num_out)).transpose(0, 1)  # (n * n, P, O)
        d_kernels = torch.bmm(d_products.transpose(1, 2), inputs.transpose(0, 1))  # (n * n, O, C)
        d_weight = (to_kernel.T @ d_kernels.view(n * n, -1)).view(3, 3, num_out, channels).permute(2, 3, 0, 1)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None
        d_inputs = torch.bmm(d_products, kernels)  # (n * n, P, C)
        d_tiles = (to_input.T @ d_inputs.view(n * n, -1)).view(n, n, num, rows, columns, channels)
        d_tiles = d_tiles.permute(2, 3, 0, 4, 1, 5)  # (B, rows, n, columns, n, C)
        # Tiles overlap by two pixels: the last two rows and columns of each lie on the next one's first.
        d_padded = d_tiles.new_zeros(num, rows + 1, tile, columns + 1, tile, channels)
        d_padded[:, :rows, :, :columns] = d_tiles[:, :, :tile, :, :tile]
        d_padded[:, 1:, :2, :columns] += d_tiles[:, :, tile:, :, :tile]
        d_padded[:, :rows, :, 1:, :2] += d_tiles[:, :, :tile, :, tile:]
        d_padded[:, 1:, :2, 1:, :2] += d_tiles[:, :, tile:, :, tile:]
        d_padded = d_padded.view(num, (rows + 1) * tile, (columns + 1) * tile, channels)
        d_images = d_padded[:, 1 : size[0] + 1, 1 : size[1] + 1].contiguous()  # batch norm is slow on gaps
        return d_images.permute(0, 3, 1, 2), d_weight, d_bias, None, None


def choose_tile(height: int, width: int) -> int:
    """Results of a tile along each axis, 2 to 5, so that all tiles together take the fewest multiplications."""
    return min(TILES, key=lambda tile: math.ceil(height / tile) * math.ceil(width / tile) * (tile + 2) ** 2)
