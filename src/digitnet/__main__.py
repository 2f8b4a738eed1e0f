"""``python -m digitnet COMMAND``: the table of commands. Each is imported only when it is typed."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import digitnet
from digitnet.errors import nearest_name, to_one_line

# command: (where it is, what it does). fit, validate and test are Lightning's command line; the other functions become
# commands by their signature and docstring.
COMMANDS = {
    "fit": ("digitnet.cli:main", "train; TensorBoard logs and checkpoints go to lightning_logs/"),
    "validate": ("digitnet.cli:main", "score the newest run's best checkpoint on its validation set"),
    "test": (
        "digitnet.cli:main",
        "score the newest run's best checkpoint on its test set; writes <run>/report/report.html",
    ),
    "explore": ("digitnet.study.explore:explore", "pictures of the data: samples, class balance, augmentation"),
    "report": ("digitnet.study.report:report", "write the report.html of a tested run again"),
    "ablate": (
        "digitnet.study.ablation:ablate",
        "train a folder of configs, several seeds each; a table of results",
    ),
    "protocol": ("digitnet.study.protocol:protocol", "the figure of a recipe, several seeds: docs/protocol.md"),
    "benchmark": ("digitnet.study.benchmark:benchmark", "speed here and now, beside plain PyTorch and Keras"),
    "robustness": ("digitnet.study.robustness:robustness", "score a checkpoint on digits spoiled in 15 ways"),
    "predict": ("digitnet.apply.predict:predict", "read people's own digits: photos, scans, drawings"),
    "serve": ("digitnet.apply.serve:serve", "draw a digit in the browser; JSON API"),
    "committee": ("digitnet.apply.committee:committee", "several checkpoints as one, which answers with their mean"),
    "export": ("digitnet.apply.export:export", "the network as ONNX or .pt2, for other programs; compared first"),
    "convert": ("digitnet.apply.keras_weights:convert", "Keras weights (.h5, .weights.h5, .keras) to .ckpt, and back"),
}

# What follows a command of Lightning's once it is done, given the run's folder or, outside one, that of the report.
FOLLOW_UPS = {"test": "digitnet.study.report:report"}

HELP = """\
digitnet: read handwritten digits; a small, complete example of PyTorch Lightning.

usage: python -m digitnet COMMAND [--help | arguments]

commands:
{commands}

to begin with:
  python -m digitnet fit --config configs/quickstart.yaml   train on bundled digits, a minute, no network
  python -m digitnet fit --config configs/fast.yaml         train on MNIST, a minute or two
  python -m digitnet fit --config configs/final.yaml        train on MNIST, the write-up's recipe
  python -m digitnet test                                   how good is it?
  tensorboard --logdir lightning_logs                       watch

DIGITNET_DEBUG=1 shows the traceback behind an error line.
"""


def main(args: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed with one line on stderr, 2 wrong usage, or its own.

    Args:
        args: the command and what follows it; ``sys.argv[1:]`` by default.
    """
    if args is None and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for names with letters that the output's encoding lacks
    args = sys.argv[1:] if args is None else args
    try:
        code = run_command(args)
        print(end="", flush=True)  # now, where a pipe that nobody reads can be told of
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            return 141
        if os.environ.get("DIGITNET_DEBUG"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # else "[Errno 17] File exists: 'a.png'"
            text = f"{error.filename}: {error.strerror.lower()}"
        print(f"digitnet: error: {to_one_line(text)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("digitnet: stopped", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def run_command(args: list[str]) -> Any:
    """Run the command that ``args`` begin with, on what follows it; return what it returns, or an exit code."""
    command = args[0] if args else ""
    if command in ("", "-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<11}{summary}" for name, (_, summary) in COMMANDS.items())))
        return 0 if command else 2
    if command == "--version":
        print(f"digitnet {digitnet.__version__}")
        return 0
    if command not in COMMANDS:
        near = nearest_name(command, COMMANDS)
        print(f"digitnet: error: no command {command!r}{near} (python -m digitnet --help lists them)", file=sys.stderr)
        return 2
    function = load_function(COMMANDS[command][0])
    if function.__module__ != "digitnet.cli":
        from digitnet.parsing import run_function  # takes a while that --help need not wait for

        return run_function(function, command, args[1:])
    cli = function(args)
    if command in FOLLOW_UPS and cli.trainer.is_global_zero:
        load_function(FOLLOW_UPS[command])(cli.tested_folder)
    return 0


def is_unread() -> bool:
    """Whether nobody reads what is printed, as after ``| head``; Python then does not complain of it at its end."""
    try:
        print(flush=True)  # writes something: what had not been written is forgotten by now
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def load_function(place: str) -> Callable[..., Any]:
    """Import a function named as ``module:function``.

    What an import makes mostly stays until the end. The garbage collector is kept from walking it in vain, now and when
    the process ends, which takes a quarter of the time that a short command takes. All else that is there is kept from
    it, too: little before a command, and after one, before its follow-up, what is about to end.
    """
    module, _, name = place.partition(":")
    if module not in sys.modules:
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            import_module(module)
        finally:
            gc.freeze()
            if was_collecting:
                gc.enable()
    function: Callable[..., Any] = getattr(sys.modules[module], name)
    return function


if __name__ == "__main__":
    sys.exit(main())
