"""How many mistakes committees of two, three or more of a protocol's networks make, every choice of them.

    python -m digitnet protocol configs/best.yaml --seeds 5
    python benchmarks/committees.py lightning_logs/protocol/best-????????

Each network answers for the 10,000 classic test images once; committees are means of these probabilities, as
digitnet.model.Committee's are. Choices that share members are not independent, so the spread among them says little
of what new seeds would make. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from digitnet.checkpoints import load_net
from digitnet.data import fetch_digits
from digitnet.model import run_in_batches
from digitnet.study.published import CLASSIC_TEST_START

LAST = 5_000  # the write-up's test images are those from here on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of recipes' seeds")
    args = parser.parse_args()
    runs = sorted(path.parent for folder in args.runs for path in folder.glob("seed_*/result.json"))  # that are done
    if not runs:
        parser.error(f"runs are {', '.join(map(str, args.runs))}: no seed_*/result.json there; run protocol")
    for result in (json.loads((run / "result.json").read_text()) for run in runs):
        if "loss_odd" in result or result.get("source", "mnist") != "mnist":
            parser.error("a run was scored on a hold-out or on other digits, not on the 10,000 test images of MNIST")
    digits = fetch_digits("mnist")
    images = torch.from_numpy(digits.images[CLASSIC_TEST_START:])[:, None]
    labels = torch.from_numpy(digits.labels[CLASSIC_TEST_START:])

    answers: list[Tensor] = []  # (10,000, 10) each
    num_parameters = []
    for run in runs:
        net, _ = load_net(run / "checkpoints" / "last.ckpt")
        net = net.to(memory_format=torch.channels_last)
        answers.append(run_in_batches(net, images).softmax(dim=1))
        num_parameters.append(sum(parameter.numel() for parameter in net.parameters()))

    print("| networks | parameters | committees | mistakes in 10,000: mean | fewest | most | in the last 5,000: mean |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for size in range(1, len(answers) + 1):
        choices = list(combinations(range(len(answers)), size))
        wrongs = [torch.stack([answers[k] for k in choice]).mean(dim=0).argmax(dim=1) != labels for choice in choices]
        totals = [int(wrong.sum()) for wrong in wrongs]
        lasts = [int(wrong[LAST:].sum()) for wrong in wrongs]
        parameters = f"{mean(sum(num_parameters[k] for k in choice) for choice in choices):,.0f}"
        cells = (size, parameters, len(choices), f"{mean(totals):.1f}", min(totals), max(totals), f"{mean(lasts):.1f}")
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
