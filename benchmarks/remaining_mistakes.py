"""What the networks of a protocol still misread, sorted by what a person sees.

    python -m digitnet protocol configs/best.yaml --seeds 5
    python benchmarks/remaining_mistakes.py lightning_logs/protocol/best-???????? results/remaining_mistakes_zoom.csv

The table has a row for each of the 10,000 test images that one of the networks or more misread: index, label, the digit
most of those read, how many of them, and the verdict of somebody who looked at it. Rows that are missing are added with
the verdict "not looked at yet", those of labels known to be wrong with that; verdicts already there stay. A table with
verdicts on images that all of these networks read right is not replaced. Draws the images, sorted by verdict, beside
the table.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from digitnet.canvas import draw_blocks
from digitnet.checkpoints import load_net
from digitnet.data import fetch_digits
from digitnet.figures import render
from digitnet.files import write_file
from digitnet.model import run_in_batches
from digitnet.study.published import CLASSIC_TEST_START, KNOWN_WRONG

VERDICTS = ("wrong label", "no digit", "ambiguous", "ours to fix", "not looked at yet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of a recipe's seeds")
    parser.add_argument("table", type=Path, help="CSV to write, and to read verdicts from if it is there")
    parser.add_argument("--verdicts", type=Path, metavar="FILE.csv", help="table of other networks, to read from, too")
    args = parser.parse_args()
    seeds = sorted(args.runs.glob("seed_*/result.json"))
    if not seeds:
        parser.error(f"runs is {args.runs}: no seed_*/result.json there; run protocol")
    results = [json.loads(path.read_text()) for path in seeds]
    if any("loss_odd" in result for result in results):
        parser.error(f"runs is {args.runs}: scored on a hold-out, not on the 10,000 test images")
    if any(result.get("source", "mnist") != "mnist" for result in results):
        parser.error(f"runs is {args.runs}: scored on other digits than MNIST's")
    counts = Counter(index for result in results for index in result["mistakes"])
    indices = sorted(counts)
    digits = fetch_digits("mnist")
    images = digits.images[CLASSIC_TEST_START:][indices]
    labels = digits.labels[CLASSIC_TEST_START:][indices]

    batch = torch.from_numpy(images)[:, None]
    nets = [load_net(path.parent / "checkpoints" / "last.ckpt")[0] for path in seeds]
    logits = torch.stack([run_in_batches(net, batch) for net in nets], dim=1)
    guesses = logits.argmax(dim=2)  # (N, seeds)
    # The label itself where rounding lets every network read it after all.
    read = [(Counter(guess for guess in row if guess != label).most_common(1) or [(label, 0)])[0][0]
            for row, label in zip(guesses.tolist(), labels.tolist(), strict=True)]  # fmt: skip

    known = {index: "no digit" if digit is None else "wrong label" for index, digit in KNOWN_WRONG.items()}
    if args.verdicts:
        known |= read_verdicts(args.verdicts)
    if args.table.is_file():
        given = read_verdicts(args.table)
        others = [index for index, verdict in given.items() if verdict != VERDICTS[-1] and index not in counts]
        if others:
            parser.error(
                f"{args.table} has verdicts on {len(others)} images that these networks all read, such as {others[0]}; "
                "name another table, and this one as --verdicts"
            )
        known |= given
    table = pd.DataFrame(
        {
            "index": indices,
            "label": labels,
            "read": read,
            "networks": [counts[index] for index in indices],
            "verdict": [known.get(index, VERDICTS[-1]) for index in indices],
        }
    )
    order = table.assign(rank=table["verdict"].map(VERDICTS.index)).sort_values(
        ["rank", "networks"], ascending=[True, False]
    )
    write_file(args.table, table.to_csv(index=False).encode())
    figure = draw_verdicts(
        images[order.index],
        [f"{row.label} / {row.read}, {row.networks}" for row in order.itertuples()],
        order["verdict"].tolist(),
        f"What {len(seeds)} networks still misread in 10,000",
        "Label / what was read, and by how many of the networks.",
    )
    write_file(args.table.with_suffix(".png"), render(figure))
    print(table["verdict"].value_counts().to_string())


def draw_verdicts(
    images: np.ndarray, captions: Sequence[str], verdicts: Sequence[str], title: str, note: str
) -> Figure:
    """Images sorted by what somebody who looked at them said: a block for each verdict, in the order they first come.

    Args:
        images: (N, 28, 28).
        captions: N, below each image; short, such as "4 / 9".
        verdicts: N.
        title: of the figure.
        note: below it.
    """
    kinds = list(dict.fromkeys(verdicts))
    picks = {kind: np.flatnonzero(np.array(verdicts) == kind) for kind in kinds}
    blocks = [(f"{kind}: {len(picks[kind])}", picks[kind], True) for kind in kinds]
    return draw_blocks(images, captions, blocks, title, columns=10, note=note)


def read_verdicts(path: Path) -> dict[int, str]:
    """Of a table written before: verdicts by index, of what was looked at."""
    given = dict(pd.read_csv(path, keep_default_na=False)[["index", "verdict"]].itertuples(index=False))
    for index, verdict in given.items():
        if verdict not in ("", *VERDICTS):
            raise SystemExit(f"{path}: the verdict on {index} is {verdict}; it must be one of: {', '.join(VERDICTS)}")
    return {index: verdict for index, verdict in given.items() if verdict not in ("", VERDICTS[-1])}


if __name__ == "__main__":
    main()
