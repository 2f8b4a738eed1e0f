"""What a config of fit says of the data and the network, for those who do not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from digitnet.data import MNISTDataModule
from digitnet.errors import nearest_name, to_one_line
from digitnet.imports import limit_imports
from digitnet.model import ARCHITECTURES, SingleNet

SECTIONS = (  # of a config of fit
    "seed_everything", "trainer", "model", "data", "early_stopping", "best_checkpoint", "last_checkpoint", "pictures",
    "calibration", "ckpt_path",
)  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The YAML of a fit config or of a run's config.yaml.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or has no keys.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {to_one_line(str(error))}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config: it has no keys such as data or model")
    return config


def load_data_module(config: dict[str, Any]) -> MNISTDataModule:
    """The data module that a config's ``data`` section describes, built as ``fit`` builds it.

    Raises:
        ValueError: an unknown key, a wrong type, or an augmentation that cannot be made.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    for key in config:
        if key not in SECTIONS:
            raise ValueError(f"the config has a key {key!r}, which fit does not know{nearest_name(str(key), SECTIONS)}")
    limit_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MNISTDataModule, "data")
    try:
        settings = config.get("data") or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{settings!r} where keys such as source and split are expected")
        module = parser.instantiate(parser.parse_object({"data": settings})).data
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"the config's data section: {to_one_line(str(error))}") from error
    assert isinstance(module, MNISTDataModule)
    return module


def make_untrained(config: dict[str, Any]) -> SingleNet:
    """A network of the architecture that a config names, ready to be trained.

    Raises:
        ValueError: there is no such architecture.
    """
    section = config.get("model")
    name = section.get("architecture", "digitnet") if isinstance(section, dict) else "digitnet"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"model.architecture is {name}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]()
