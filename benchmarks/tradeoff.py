"""Draws accuracy against seconds of training from a table of measured figures.

    python benchmarks/tradeoff.py results/tradeoff.csv

The table's columns: figure (the picture a row belongs to), curve, seconds (empty for a record whose time is not known),
mistakes, sd (empty for a single run). Writes <table>_<figure>.png for each figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from digitnet.canvas import BLUE, GREY, INK, VERMILION, WIDTH_IN, make_figure, make_plain
from digitnet.figures import render
from digitnet.files import write_file

TITLES = {
    "validation": ("How soon: the write-up's validation images", "mistakes in the first 5,000"),
    "classic": ("How good: the classic test images", "mistakes in 10,000"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    table_path = parser.parse_args().table
    try:
        table = pd.read_csv(table_path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
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


def draw_tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], records: Mapping[str, float], title: str, unit: str
) -> Figure:
    """Mistakes against seconds of training, both on logarithmic scales.

    Args:
        curves: up to four: name -> points: seconds, mistakes, and the standard deviation of these (0 draws none).
        records: name -> mistakes of networks whose training time is not known: lines across.
        title: of the figure.
        unit: what the mistakes are counted in.

    Raises:
        ValueError: there are more curves.
    """
    looks = (("o", BLUE), ("s", VERMILION), ("^", INK), ("D", GREY))
    if len(curves) > len(looks):
        raise ValueError(f"there are {len(curves)} curves; up to {len(looks)} can be told apart")
    figure = make_figure(WIDTH_IN, 3.9, title)
    axes = figure.subplots()
    for (name, points), (marker, color) in zip(curves.items(), looks, strict=False):
        seconds, mistakes, spread = (np.array(each) for each in zip(*points, strict=True))
        style: dict[str, Any] = {"marker": marker, "color": color, "linewidth": 1.2, "markersize": 5}
        axes.errorbar(seconds, mistakes, yerr=np.where(spread > 0, spread, np.nan), label=name, capsize=3, **style)
    for name, count in records.items():
        axes.axhline(count, color=GREY, linewidth=0.8, linestyle="--")
        # At the left: curves fall, so there they are far above the records.
        axes.text(0.01, count, name, transform=axes.get_yaxis_transform(), fontsize=8, color=GREY, va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, steps in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 4, 5, 7))):
        low, high = axis.get_view_interval()
        ticks = [step * 10**power for power in range(5) for step in steps]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(unit)
    make_plain(axes)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
