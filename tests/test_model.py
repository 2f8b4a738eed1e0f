"""DigitNet against the write-up's figures and against layers written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from digitnet.model import DigitNet


def test_parameters_per_layer_are_the_write_ups() -> None:
    net = DigitNet()
    layers = [module for module in net.modules() if hasattr(module, "weight")]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert counts == [3_200, 73_856, 147_584, 295_168, 590_080, 295_040, 8_256, 650]
    assert sum(counts) == sum(p.numel() for p in net.parameters()) == 1_413_834


def test_forward_is_the_write_ups_order_of_layers() -> None:
    net = DigitNet().eval()
    x = images = torch.rand(4, 1, 28, 28)
    for name, pooled in (("conv1", True), ("conv2", False), ("conv3", True), ("conv4", False), ("conv5", True)):
        layer = getattr(net, name)
        x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding="same"))
        x = F.max_pool2d(x, 2) if pooled else x
    x = x.flatten(1)
    assert x.shape == (4, 2_304)
    x = net.fc3(F.relu(net.fc2(F.relu(net.fc1(x)))))
    torch.testing.assert_close(net(images), x)


def test_uint8_is_scaled_by_255() -> None:
    net = DigitNet().eval()
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(net(images), net(images.double().div(255).float()))


def test_weights_start_as_keras_he_normal() -> None:
    net = DigitNet()
    for layer in (net.conv2, net.conv5, net.fc1):
        std = math.sqrt(2 / layer.weight[0].numel())
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        cut = 2 * std / 0.8796
        assert 0.95 * cut < layer.weight.abs().max().item() <= cut * 1.001
        assert layer.bias is not None
        assert not layer.bias.any()


@pytest.mark.parametrize("kind", ["dropout", "conv_dropout"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    images = torch.rand(2, 1, 28, 28)
    net = DigitNet(**{"dropout": 0.0, "conv_dropout": 0.0, kind: 0.5})
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))
    plain = DigitNet(dropout=0.0)
    assert torch.equal(plain(images), plain(images))


@pytest.mark.parametrize(("kind", "value"), [("dropout", 1.0), ("dropout", -0.1), ("conv_dropout", math.nan)])
def test_impossible_dropout_is_refused(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{kind} is {value}"):
        DigitNet(**{kind: value})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pixels_follow_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    net = DigitNet().eval().to(dtype)
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert net(images).dtype == dtype
