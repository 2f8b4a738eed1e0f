"""Training one network towards the answers of others: a committee's accuracy at one network's price."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from digitnet.checkpoints import load_net, read_data_settings
from digitnet.model import Network, SingleNet, get_members


class Teacher:
    """A trained checkpoint, whose probabilities stand in for the labels in training.

    It sees the same augmented images as the network that is trained, its pupil, and says more of each than its label:
    that this 4 might be a 9, or that its label is wrong.

    Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531; differs from
    it: temperature 1, as the answers of a committee on augmented images are soft by themselves; and few of a committee
    may answer at a time, for the time that it takes.

    Args:
        checkpoint: a best.ckpt, a last.ckpt, or what ``committee`` writes.
        label_frac: share of the true label in what is taught, in [0, 1]; the teacher's answer is the rest.
        num_answering: how many of a committee's members answer, drawn anew for each batch and each column of the pupil;
            all of them by default. The loss is linear in what is taught: its gradient is on average the one towards
            all.

    Raises:
        ValueError: the checkpoint cannot be used, or another argument lies outside its range.
    """

    def __init__(self, checkpoint: Path, label_frac: float = 0.5, num_answering: int | None = None) -> None:
        if not 0 <= label_frac <= 1:
            raise ValueError(f"label_frac is {label_frac}; it is the share of the true label, from 0 to 1")
        self.label_frac = label_frac
        net, stored = load_net(Path(checkpoint))
        net = net.to(memory_format=torch.channels_last)
        self.members = get_members(net)
        if num_answering is not None and not 1 <= num_answering <= len(self.members):
            raise ValueError(
                f"num_answering is {num_answering}; it must be from 1 to {len(self.members)}, as many as {checkpoint} "
                "has members"
            )
        self.num_answering = num_answering
        self.data_settings = read_data_settings(stored)  # what it was trained on

    def teach(self, pupil: Network, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the pupil answers in training, and what it shall.

        Where it draws its view of each image in training, as a ZoomNet does, members of the same kind of view answer
        for that very one; each of a pupil's columns has views, and answers, of its own.

        Args:
            pupil: the network that is trained, of M columns or one.
            images: (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1].
            labels: (B,) int64.

        Returns:
            Its logits (M * B, 10), those of its first column first, and probabilities (M * B, 10), float32.
        """
        logits, targets = zip(*(self._teach(column, images, labels) for column in get_members(pupil)), strict=True)
        return torch.cat(logits), torch.cat(targets)

    def _teach(self, pupil: SingleNet, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen = pupil.see(images)
        with torch.no_grad():
            members = [member.to(images.device) for member in self._draw_members()]
            view = seen.to(next(members[0].parameters()).dtype)  # the pupil may be trained in another
            answers = [member.score(view) if member.VIEW is pupil.VIEW else member(images) for member in members]
            probabilities = torch.stack([logits.float().softmax(dim=1) for logits in answers]).mean(dim=0)
            targets = torch.lerp(probabilities, F.one_hot(labels, 10).float(), self.label_frac)
        return pupil.score(seen), targets

    def _draw_members(self) -> list[SingleNet]:
        if self.num_answering is None:
            return self.members
        return [self.members[pick] for pick in torch.randperm(len(self.members))[: self.num_answering].tolist()]
