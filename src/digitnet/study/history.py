"""Loss and accuracy of each epoch of a run, from its TensorBoard events."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from digitnet.figures import History


def load_history(run: Path, monitored: str | None = None) -> History | None:
    """Loss and accuracy of each epoch from a run's TensorBoard events; None where there are none.

    An epoch that was begun again after a stop counts as it ran last.

    Args:
        run: its folder.
        monitored: a field that tells which of several validations of an epoch counts, the best by it; by default the
            last does.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what a stopped run logged twice
    events = EventAccumulator(str(run), size_guidance={SCALARS: 0})  # 0: every one
    events.Reload()
    there = set(events.Tags()["scalars"])
    if not {"epoch", "train/loss", "train/acc"} <= there:
        return None

    def read_tag(tag: str) -> dict[int, float]:
        """Step -> value, the last that was logged: files of one second are not read in the order they were written."""
        logged = sorted(events.Scalars(tag), key=lambda event: event.wall_time) if tag in there else []
        return {event.step: event.value for event in logged}

    epoch_of_step = {step: round(value) for step, value in read_tag("epoch").items()}

    def read(*tags: str) -> dict[int, list[tuple[float, ...]]]:
        """Epoch -> values of tags that are logged together, each time that they were."""
        found: dict[int, list[tuple[float, ...]]] = {}
        series = [read_tag(tag) for tag in tags]
        for step in sorted(set.intersection(*map(set, series)) & epoch_of_step.keys()):
            found.setdefault(epoch_of_step[step], []).append(tuple(values[step] for values in series))
        return found

    train, val = read("train/loss", "train/acc"), read("val/loss", "val/acc")
    if not train:
        return None
    rows = [
        (epoch + 1, *values[-1], *_find_best(val.get(epoch, [(np.nan, np.nan)]), monitored))
        for epoch, values in sorted(train.items())
    ]
    return History(np.array([row[0] for row in rows]), *np.array(rows, float).T[1:])


def _find_best(values: list[tuple[float, ...]], monitored: str | None) -> tuple[float, ...]:
    """The first best of pairs of loss and accuracy, or the last."""
    if monitored == "val_loss":
        return min(values, key=lambda pair: pair[0])
    return max(values, key=lambda pair: pair[1]) if monitored == "val_acc" else values[-1]
