"""Training on what is still hard: the examples that a small network beside gets most wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digitnet.model import to_levels


class Proxy(nn.Module):
    """A small network that says which digits are hard: 19,386 parameters, less than 1 % of DigitNet's arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=6, stride=4, padding=1)
        self.conv2 = nn.Conv2d(32, 48, kernel_size=3, padding=1)
        self.fc = nn.Linear(48 * 3 * 3, 10)
        self.pool = nn.MaxPool2d(2)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1]."""
        x = to_levels(images)  # (B, 1, 28, 28)
        x = F.relu(self.conv1(x))  # (B, 32, 7, 7)
        x = F.relu(self.pool(self.conv2(x)))  # (B, 48, 3, 3)
        return self.fc(x.flatten(1))


class HardExamples:
    """Keeps the part of each batch that is worth a training step of the large network.

    After a minute of training most digits teach nothing any more. A small network, trained on every example as it comes
    by, finds those that still do at a fraction of the cost; the large one is trained on these, and on a few of
    the others so that it does not forget what is easy. What is hard for the small one is hard for the large one, too.

    Each process of a distributed run has a small network of its own.

    Source: Coleman et al. 2020, Selection via Proxy, arXiv 1906.11829; Jordan 2024, 94% on CIFAR-10 in 3.29 seconds,
    arXiv 2404.00498, whose fastest recipe does so. Differs from both: the small network is trained along, on the
    augmented images, in the same pass.

    Args:
        keep_frac: share of each batch that is kept, in (0, 1].
        hard_frac: share of what is kept that is the hardest; the rest is drawn from the others, in [0, 1].
        lr: learning rate of the small network.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(self, keep_frac: float = 0.25, hard_frac: float = 0.75, lr: float = 2e-3) -> None:
        if not 0 < keep_frac <= 1:
            raise ValueError(f"keep_frac is {keep_frac}; it is the share of a batch to keep, above 0 and up to 1")
        if not 0 <= hard_frac <= 1:
            raise ValueError(f"hard_frac is {hard_frac}; it is the share of the kept that is hardest, from 0 to 1")
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr is {lr}; it is a learning rate, above 0")
        self.keep_frac = keep_frac
        self.hard_frac = hard_frac
        self.proxy = Proxy()
        self.optimizer = torch.optim.AdamW(self.proxy.parameters(), lr=lr, fused=True)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Train the small network on a batch, and pick from it what the large one shall be trained on.

        Args:
            images: (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1].
            labels: (B,) int64.

        Returns:
            Images (K, 1, 28, 28) and labels (K,), the hardest first; K is ``keep_frac`` of B, rounded, at least 1.
        """
        if next(self.proxy.parameters()).device != images.device:  # at the first batch
            state = self.state_dict()
            self.proxy.to(images.device)
            self.load_state_dict(state)  # the optimizer's moves along with the parameters
        losses = F.cross_entropy(self.proxy(images).float(), labels, reduction="none")  # (B,)
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()

        num_kept = max(1, round(self.keep_frac * len(labels)))
        num_hard = round(self.hard_frac * num_kept)
        order = losses.detach().argsort(descending=True)
        hard, others = order[:num_hard], order[num_hard:]
        some = others[torch.randperm(len(others), device=others.device)[: num_kept - num_hard]]
        picks = torch.cat([hard, some])
        return images[picks], labels[picks]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {"proxy": self.proxy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``'s result.

        Raises:
            ValueError: it is that of another small network.
        """
        try:
            self.proxy.load_state_dict(state["proxy"])
        except RuntimeError as error:
            raise ValueError(
                "the checkpoint's HardExamples had another small network, that of another version; it can be scored, "
                "but fit cannot go on from it: train anew"
            ) from error
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = lr  # as it is configured now, like keep_frac
