"""Winograd's convolution against PyTorch's own in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from digitnet.model import DigitNet
from digitnet.winograd import Conv3x3, WinogradFunction, choose_tile, make_transforms


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 5])
def test_transforms_give_a_convolution(tile: int) -> None:
    to_input, to_kernel, to_output = (transform.double() for transform in make_transforms(tile))
    torch.manual_seed(0)
    image, kernel = torch.randn(tile + 2, tile + 2).double(), torch.randn(3, 3).double()
    found = to_output @ ((to_kernel @ kernel.flatten()) * (to_input @ image.flatten()))
    torch.testing.assert_close(found, F.conv2d(image[None, None], kernel[None, None]).flatten(), rtol=0, atol=1e-5)


def test_the_input_transform_of_four_is_the_papers() -> None:
    # Lavin and Gray 2016, section 4.2; a row of theirs may carry a factor here that its column elsewhere makes up for.
    to_input, _, to_output = make_transforms(4)
    n = 6
    one_axis = to_input.reshape(n, n, n, n)[:, 0, :, 0] / 4  # the first row of the paper's starts with 4
    paper = torch.tensor(
        [
            [4.0, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    )
    for ours, theirs in zip(one_axis, paper, strict=True):
        assert torch.equal(ours, theirs) or torch.equal(ours, -theirs)
    assert to_output.shape == (16, 36)


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(14, 14, 5), (5, 14, 5), (7, 7, 4), (14, 4, 4), (6, 6, 3), (3, 14, 3), (3, 9, 3), (2, 2, 2), (1, 1, 2)],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_values_and_gradients_are_those_of_the_plain_sum(height: int, width: int, tile: int, pooled: bool) -> None:
    torch.manual_seed(0)
    if not pooled:
        assert choose_tile(height, width) == tile
    images = torch.randn(3, 8, height, width, requires_grad=True)
    weight, bias = torch.randn(6, 8, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    rows, columns = (height // 2 * 2, width // 2 * 2) if pooled and min(height, width) > 1 else (height, width)
    inputs = (images, weight, bias)
    expected = F.conv2d(images.double(), weight.double(), bias.double(), padding=1)[:, :, :rows, :columns]
    found = WinogradFunction.apply(*inputs, rows, columns)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, gradient)
    ours = torch.autograd.grad(found, inputs, gradient.float())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


def test_training_gradients_of_the_whole_network_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    net = DigitNet(dropout=0.0)
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    gradients = []
    for training in (True, False):  # Winograd's way, the plain one
        net.train(training)
        gradients.append(torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters())))
    assert any(not torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # it was another way
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


def test_scores_of_many_are_those_of_each() -> None:
    torch.manual_seed(0)
    net = DigitNet().eval()
    images = torch.rand(40, 1, 28, 28)
    with torch.inference_mode():
        many, each = net(images), torch.cat([net(image[None]) for image in images])
    assert not torch.equal(many, each)  # it was another way
    torch.testing.assert_close(many, each, rtol=0, atol=1e-4)


def test_plain_outside_float32() -> None:
    conv, images = Conv3x3(4, 5, pooled=True), torch.randn(2, 4, 7, 7)
    assert conv(images).shape == (2, 5, 6, 6)  # what the pooling drops is not computed
    with torch.no_grad():
        assert torch.equal(conv(images), F.conv2d(images, conv.weight, conv.bias, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        results = conv(images)
    assert results.shape == (2, 5, 7, 7)
    assert results.dtype == torch.bfloat16
    assert conv.double()(images.double()).dtype == torch.float64
    assert conv.eval()(images.double()).shape == (2, 5, 7, 7)


def test_without_a_bias_the_gradients_are_the_same() -> None:
    # As of a convolution before batch normalization, which has the bias.
    torch.manual_seed(0)
    inputs = (torch.randn(3, 8, 14, 14, requires_grad=True), torch.randn(6, 8, 3, 3, requires_grad=True))
    expected = F.conv2d(inputs[0].double(), inputs[1].double(), padding=1)
    found = WinogradFunction.apply(*inputs, None, 14, 14)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, gradient)
    ours = torch.autograd.grad(found, inputs, gradient.float())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


def test_no_wrong_second_derivative() -> None:
    images, weight, bias = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True), torch.zeros(3)
    results = WinogradFunction.apply(images, weight, bias, 4, 4)
    (gradient,) = torch.autograd.grad(results.pow(2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
