"""Draws accuracy against seconds of training from a table of measured figures.

    python benchmarks/tradeoff.py results/tradeoff.csv

The table's columns: figure (the picture a row belongs to), curve, seconds (empty for a record whose time is not known),
mistakes, sd (empty for a single run). Writes <table>_<figure>.png for each figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from digitnet.figures import draw_tradeoff, render
from digitnet.files import write_file

TITLES = {
    "validation": ("How soon: the write-up's validation images", "mistakes in the first 5,000"),
    "classic": ("How good: the classic test images", "mistakes in 10,000"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    table_path = parser.parse_args().table
    table = pd.read_csv(table_path)
    unknown = sorted({*table["figure"]} - TITLES.keys())
    if unknown:
        parser.error(f"{table_path}: figure is {unknown[0]}; there are {', '.join(TITLES)}")
    for name, rows in table.groupby("figure", sort=False):
        title, unit = TITLES[str(name)]
        timed = rows[rows["seconds"].notna()].fillna({"sd": 0})
        curves = {
            str(curve): list(zip(points["seconds"], points["mistakes"], points["sd"], strict=True))
            for curve, points in timed.groupby("curve", sort=False)
        }
        records = dict(rows[rows["seconds"].isna()][["curve", "mistakes"]].itertuples(index=False))
        figure = draw_tradeoff(curves, records, title, unit)
        write_file(table_path.with_name(f"{table_path.stem}_{name}.png"), render(figure))


if __name__ == "__main__":
    main()
