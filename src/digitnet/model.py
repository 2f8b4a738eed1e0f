"""DigitNet, the write-up's network; the same on digits set upright, and seen from near; several as one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digitnet.views import see_all, see_near, see_upright
from digitnet.winograd import Conv3x3

NORM_MOMENTUM = 0.02  # the running statistics are the mean of about the last 50 steps


class SingleNet(nn.Module, ABC):
    """A network that sees images in its own way, then scores what it saw."""

    VIEW: Callable[[Tensor, bool], Tensor]  # images and whether this is training -> what counts of them

    def forward(self, images: Tensor) -> Tensor:
        """Score each image for each digit.

        Args:
            images: (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1]; ink is bright, paper is 0.

        Returns:
            Logits (B, 10), unbounded; their softmax is the probability of each digit.
        """
        return self.score(self.see(images))

    def see(self, images: Tensor) -> Tensor:
        """What of such images counts: (B, 1, 28, 28)."""
        return self.VIEW(to_levels(images, next(self.parameters()).dtype), self.training)

    @abstractmethod
    def score(self, seen: Tensor) -> Tensor:
        """Logits (B, 10) of what is seen."""


class DigitNet(SingleNet):
    """Five convolutions and three dense layers: 28x28 pixels in, ten logits out, 1,413,834 parameters.

    Source: the write-up's Keras model, layer for layer. The order of pooling and ReLU is swapped, which changes no
    value (a maximum commutes with a monotone function) and leaves a quarter of the pixels for the ReLU.

    Differs from Keras: no softmax at the end (the loss takes logits), and the flattened features are ordered
    channel-height-width instead of height-width-channel.

    Args:
        dropout: probability of dropping a unit after each of the two hidden dense layers, in [0, 1).
        conv_dropout: probability of dropping a value after each of the three poolings, in [0, 1).
        batch_norm: whether to train with batch normalization of each hidden layer, which ``folded`` then makes part
            of these layers. Not in the write-up; no parameter more.

    Raises:
        ValueError: when a probability lies outside [0, 1).
    """

    VIEW = staticmethod(see_all)

    def __init__(self, dropout: float = 0.2, conv_dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        for name, value in (("dropout", dropout), ("conv_dropout", conv_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it is a probability and must lie in [0, 1)")
        self.conv1 = nn.Conv2d(1, 64, kernel_size=7, padding=3)
        self.conv2 = Conv3x3(64, 128)
        self.conv3 = Conv3x3(128, 128, pooled=True)
        self.conv4 = Conv3x3(128, 256)
        self.conv5 = Conv3x3(256, 256, pooled=True)
        self.fc1 = nn.Linear(256 * 3 * 3, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.conv_dropout = nn.Dropout(conv_dropout)
        self.apply(init_he_normal)
        normed = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2") if batch_norm else ()
        self.norms = nn.ModuleDict({name: BatchNorm(getattr(self, name)) for name in normed})

    def score(self, seen: Tensor) -> Tensor:
        x = self.conv_dropout(self._activate("conv1", self.pool(self.conv1(seen))))  # (B, 64, 14, 14)
        x = self._activate("conv2", self.conv2(x))  # (B, 128, 14, 14)
        x = self.conv_dropout(self._activate("conv3", self.pool(self.conv3(x))))  # (B, 128, 7, 7)
        x = self._activate("conv4", self.conv4(x))  # (B, 256, 7, 7)
        x = self.conv_dropout(self._activate("conv5", self.pool(self.conv5(x))))  # (B, 256, 3, 3)
        x = x.flatten(1)  # (B, 2304)
        x = self.dropout(self._activate("fc1", self.fc1(x)))  # (B, 128)
        x = self.dropout(self._activate("fc2", self.fc2(x)))  # (B, 64)
        return self.fc3(x)  # (B, 10)

    def _activate(self, name: str, x: Tensor) -> Tensor:
        return F.relu(self.norms[name](x) if name in self.norms else x)

    @torch.no_grad()
    def folded(self) -> DigitNet:
        """This network without batch normalization: a plain one of the same values when scoring."""
        folded = DigitNet(self.dropout.p, self.conv_dropout.p)
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("norms.")}
        for name, norm in self.norms.items():
            assert isinstance(norm, BatchNorm)
            scale = (norm.var + norm.eps).rsqrt()  # (C,)
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            state[f"{name}.bias"] = norm.bias - norm.mean * scale
        folded.load_state_dict(state)
        return folded.train(self.training)


class BatchNorm(nn.Module):
    """Batch normalization with the bias of the layer before it, which loses its own, and without a gain.

    A gain would be one factor twice, as ReLU and pooling pass it on to the next layer's weights; and a positive factor
    alone may trade places with a pooling.

    Source: Ioffe and Szegedy 2015, Batch Normalization, arXiv 1502.03167.

    Args:
        layer: convolution or dense layer, whose channels are normalized.
    """

    mean: Tensor  # (C,), of the last steps
    var: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        assert layer.bias is not None
        self.bias = layer.bias
        layer.bias = None  # the normalization would subtract it again
        self.eps = 1e-5
        # Not zeros_like: on the meta device, where checkpoints are verified, that takes half a second of imports.
        like: dict[str, Any] = {"dtype": self.bias.dtype, "device": self.bias.device}
        self.register_buffer("mean", torch.zeros(len(self.bias), **like))
        self.register_buffer("var", torch.ones(len(self.bias), **like))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C) or (B, C, H, W) in and out."""
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # on a view with gaps it takes ten times as long
        gain = torch.ones_like(self.bias)  # and without one, three times
        by_batch = self.training and x.numel() > x.shape[1]  # one value a channel has no variance
        return F.batch_norm(x, self.mean, self.var, gain, self.bias, by_batch, NORM_MOMENTUM, self.eps)


class UprightNet(SingleNet):
    """DigitNet on digits set upright, enlarged and normalized; trained with batch normalization, 1,413,834 parameters.

    Writers differ in slant; what is taken out beforehand need not be learned from examples. Trained and folded, it is
    the write-up's network behind a step without parameters.

    Source: LeCun, Bottou, Bengio and Haffner 1998, Gradient-Based Learning Applied to Document Recognition, whose table
    has rows "deslanted".

    Args:
        dropout: as of DigitNet.
        conv_dropout: as of DigitNet.
        batch_norm: as of DigitNet, but on.

    Raises:
        ValueError: when a probability lies outside [0, 1).
    """

    VIEW = staticmethod(see_upright)
    KEY = "digitnet"  # of the network behind the view, in checkpoints: it tells one view from another

    def __init__(self, dropout: float = 0.2, conv_dropout: float = 0.0, batch_norm: bool = True) -> None:
        super().__init__()
        self.add_module(self.KEY, DigitNet(dropout, conv_dropout, batch_norm))

    @property
    def behind(self) -> DigitNet:
        """The network behind the view."""
        net = self.get_submodule(self.KEY)
        assert isinstance(net, DigitNet)
        return net

    def score(self, seen: Tensor) -> Tensor:
        return self.behind.score(seen)

    def fold(self) -> None:
        """Make batch normalization part of the layers, in place."""
        self.add_module(self.KEY, self.behind.folded())


class ZoomNet(UprightNet):
    """UprightNet that sees digits from near; in training, each from a place, an angle and a distance of its own.

    It does the work of an augmentation by itself, as one that turned or bent digits before they are set upright would
    be undone in part.
    """

    VIEW = staticmethod(see_near)
    KEY = "zoomed"


class Committee(nn.Module):
    """Several networks as one, whose probabilities are the mean of theirs.

    Trained apart and put together, or trained at once, as the columns of one network; each then learns by itself.

    Source: Ciresan, Meier and Schmidhuber 2012, Multi-column Deep Neural Networks for Image Classification, arXiv
    1202.2745.

    Args:
        members: the networks, one or more.
    """

    def __init__(self, members: Sequence[SingleNet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28): logarithms of the mean probabilities.

        In training, logits (M * B, 10): those of the first of M members, then of the next, and so on.
        """
        if self.training:
            return torch.cat([member(images) for member in self.members])
        log_probabilities = torch.stack([member(images).log_softmax(dim=1) for member in self.members])  # (M, B, 10)
        return log_probabilities.logsumexp(dim=0) - math.log(len(self.members))


Network = SingleNet | Committee
ARCHITECTURES: dict[str, type[DigitNet | UprightNet]] = {"digitnet": DigitNet, "upright": UprightNet, "zoom": ZoomNet}


def get_members(net: Network) -> list[SingleNet]:
    """The single networks of a committee or of columns; of a single network, that one."""
    return [net] if isinstance(net, SingleNet) else cast(list[SingleNet], list(net.members))


def init_he_normal(module: nn.Module) -> None:
    """Initialise a layer as Keras' ``he_normal`` does, biases at zero; modules without weights are left alone.

    A normal distribution of variance 2 / fan_in, cut at two standard deviations, then widened so that the variance
    after the cut is 2 / fan_in again. Source: Keras ``VarianceScaling(2, "fan_in", "truncated_normal")``; differs from
    ``torch.nn.init.kaiming_normal_``, which does not cut.
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        fan_in = module.weight[0].numel()
        std = math.sqrt(2 / fan_in) / 0.87962566103423978  # the sd of a unit normal cut at +-2
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def to_levels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [0, 1]: uint8 ones are scaled, others are so already; in the precision given."""
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; they must be uint8 in [0, 255], or floating point in [0, 1]")
    return images.to(dtype)


@torch.no_grad()
def run_in_batches(module: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """What a module makes of images (N, 1, 28, 28), batch by batch on its device; float32 (N, ...) on the CPU."""
    device = next(module.parameters()).device
    return torch.cat([module(batch.to(device)).float().cpu() for batch in images.split(batch_size)])
