"""Writes MNIST with its two kinds apart: trained on one, a recipe is scored on the other, 30,000 images, other writers.

    python benchmarks/kinds.py kinds/kinds.npz
    cp configs/best_digitnet.yaml kinds/                              # the recipe
    echo 'data: {source: kinds/kinds.npz}' > kinds/base.yaml          # goes with every config of its folder
    python -m digitnet protocol kinds/best_digitnet.yaml --seeds 1 --holdout 30000

Training images at even places come first, then those at odd places, then the test images, which are not scored: the
30,000 held out are then all those at odd places, and what the table counts "at odd places" is half of them.
``--odd_first`` turns it round. The images are those that `fit` reads (SCIKIT_LEARN_DATA).
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from digitnet.data import fetch_digits
from digitnet.files import write_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--odd_first", action="store_true")
    args = parser.parse_args()
    digits = fetch_digits("mnist")
    places = np.arange(60_000).reshape(-1, 2)  # a column for each kind
    order = np.concatenate([places[:, :: -1 if args.odd_first else 1].T.ravel(), np.arange(60_000, 70_000)])
    packed = io.BytesIO()
    np.savez_compressed(packed, images=digits.images[order], labels=digits.labels[order])
    write_file(args.output, packed.getvalue())


if __name__ == "__main__":
    main()
