"""Training one network towards the answers of others: a committee's accuracy at one network's price."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from digitnet.checkpoints import load_net, read_data_settings
from digitnet.model import Committee, Network, SingleNet


class Teacher:
    """A trained checkpoint, whose probabilities stand in for the labels in training.

    It sees the same augmented images as the network that is trained, its pupil, and says more of each than its label:
    that this 4 might be a 9, or that its label is wrong.

    Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531; differs from
    it: temperature 1, as the answers of a committee on augmented images are soft by themselves.

    Args:
        checkpoint: a best.ckpt, a last.ckpt, or what ``committee`` writes.
        label_frac: share of the true label in what is taught, in [0, 1]; the teacher's answer is the rest.

    Raises:
        ValueError: the checkpoint cannot be used, or ``label_frac`` lies outside its range.
    """

    def __init__(self, checkpoint: Path, label_frac: float = 0.5) -> None:
        if not 0 <= label_frac <= 1:
            raise ValueError(f"label_frac is {label_frac}; it is the share of the true label, from 0 to 1")
        self.label_frac = label_frac
        net, stored = load_net(Path(checkpoint))
        net = net.to(memory_format=torch.channels_last)
        self.members = cast(list[SingleNet], list(net.members)) if isinstance(net, Committee) else [net]
        self.data_settings = read_data_settings(stored)  # what it was trained on

    def teach(self, pupil: Network, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the pupil answers, and what it shall.

        Where it draws its view of each image in training, as a ZoomNet does, members of the same kind of view answer
        for that very one.

        Args:
            pupil: the network that is trained, no committee.
            images: (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1].
            labels: (B,) int64.

        Returns:
            Its logits (B, 10), and probabilities (B, 10), float32.
        """
        assert isinstance(pupil, SingleNet)
        seen = pupil.see(images)
        with torch.no_grad():
            members = [member.to(images.device) for member in self.members]
            view = seen.to(next(members[0].parameters()).dtype)  # the pupil may be trained in another
            answers = [member.score(view) if member.VIEW is pupil.VIEW else member(images) for member in members]
            probabilities = torch.stack([logits.float().softmax(dim=1) for logits in answers]).mean(dim=0)
            targets = torch.lerp(probabilities, F.one_hot(labels, 10).float(), self.label_frac)
        return pupil.score(seen), targets
