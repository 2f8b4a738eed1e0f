"""``python -m digitnet COMMAND``: the table of commands. Each is imported only when it is typed."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import digitnet
from digitnet.errors import OneLineErrors, nearest_name, to_one_line

# command: (where it is, what it does). fit, validate and test are Lightning's command line; the other functions become
# commands by their signature and docstring.
COMMANDS = {
    "fit": ("digitnet.cli:main", "train; TensorBoard logs and checkpoints go to lightning_logs/"),
    "validate": ("digitnet.cli:main", "score the newest run's best checkpoint on its validation set"),
    "test": ("digitnet.cli:main", "score the newest run's best checkpoint on its test set; writes <run>/report/"),
    "explore": ("digitnet.study.explore:explore", "pictures of the data: samples, class balance, augmentation"),
    "report": ("digitnet.study.report:report", "the report.html of a tested run: history, mistakes, confusions"),
    "ablate": (
        "digitnet.study.ablation:ablate",
        "train a folder of configs, several seeds each; a table of results",
    ),
    "convert": ("digitnet.apply.keras_weights:convert", "Keras weights (.h5, .weights.h5, .keras) to .ckpt, and back"),
    "serve": ("digitnet.apply.serve:serve", "draw a digit in the browser; JSON API"),
}

HELP = """\
digitnet: read handwritten digits; a small, complete example of PyTorch Lightning.

usage: python -m digitnet COMMAND [--help | arguments]

commands:
{commands}

to begin with:
  python -m digitnet fit --config configs/quickstart.yaml   train on bundled digits, a minute, no network
  python -m digitnet fit --config configs/final.yaml        train on MNIST, the write-up's recipe
  python -m digitnet test                                   how good is it?
  tensorboard --logdir lightning_logs                       watch

DIGITNET_DEBUG=1 shows the traceback behind an error line.
"""


def main(args: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed with one line on stderr, 2 wrong usage.

    Args:
        args: the command and what follows it; ``sys.argv[1:]`` by default.
    """
    args = sys.argv[1:] if args is None else args
    command = args[0] if args else ""
    if command in ("", "-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items())))
        return 0 if command else 2
    if command == "--version":
        print(f"digitnet {digitnet.__version__}")
        return 0
    if command not in COMMANDS:
        near = nearest_name(command, COMMANDS)
        print(f"digitnet: error: no command {command!r}{near} (python -m digitnet --help lists them)", file=sys.stderr)
        return 2
    module, _, name = COMMANDS[command][0].partition(":")
    try:
        function = getattr(import_module(module), name)
        if module == "digitnet.cli":
            function(args)
        else:
            run_function(function, command, args[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("DIGITNET_DEBUG"):
            raise
        print(f"digitnet: error: {to_one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("digitnet: stopped", file=sys.stderr)
        return 130
    return 0


def run_function(function: Callable[..., Any], command: str, args: list[str]) -> None:
    """Call a function with arguments parsed by its signature; its docstring is the ``--help`` text."""
    from jsonargparse import ArgumentParser

    class Parser(OneLineErrors, ArgumentParser):
        pass

    summary = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    parser = Parser(prog=f"python -m digitnet {command}", description=summary, allow_abbrev=False)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    function(**vars(parser.instantiate(parser.parse_args(args))))


if __name__ == "__main__":
    sys.exit(main())
