"""Which classes a config may name: those that building a network, training it and drawing its data can need."""

from __future__ import annotations

import os

from jsonargparse import set_parsing_settings

import digitnet

# Naming a class runs its constructor with the config's arguments, so a config is a program in a small language. These
# are its words; whoever defines a class outside of them allows its package by name. Not all of digitnet: benchmark's
# callback starts a program that its argument names.
OURS = ("augment", "callbacks", "classifier", "data", "distillation", "disturb", "model", "pictures", "selection")
ALLOWED = ("lightning", "torch.nn", "torch.optim", "torchmetrics", "torchvision.transforms")
VARIABLE = "DIGITNET_ALLOW_IMPORTS"  # more of them, separated by commas


def limit_imports() -> None:
    """Let configs and flags name classes of ``ALLOWED`` and ``DIGITNET_ALLOW_IMPORTS`` alone, in all of this process.

    Raises:
        ValueError: an entry of the environment variable is no name of a package, or one that is never allowed.
    """
    more = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    dtypes = [f"torch.{name}" for name in ("bfloat16", "dtype", "float16", "float32", "uint8")]  # for transforms
    ours = [f"digitnet.{name}" for name in (*digitnet.__all__, *OURS)]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ours, *ALLOWED, *dtypes, *more])
    except ValueError as error:
        raise ValueError(f"{VARIABLE} is {os.environ[VARIABLE]}: {error}") from error
