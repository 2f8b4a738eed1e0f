"""How what is typed becomes settings: parsers with one-line errors, and functions as commands."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any, NoReturn

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from digitnet.errors import nearest_name, to_one_line


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of the description as they were written."""


class OneLineErrors:
    """Mixin for an argparse-like parser: a wrong flag or config key is told in one line, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        flags: Iterable[str] = getattr(parser, "_option_string_actions", {})
        line = to_one_line(message)
        print(f"digitnet: error: {line}{suggest_name(line, flags)}", file=sys.stderr)
        sys.exit(2)


def suggest_name(message: str, flags: Iterable[str]) -> str:
    """``nearest_name`` to the key that a one-line message of argparse or jsonargparse complains of.

    Args:
        message: the line.
        flags: the flags there are, such as "--trainer.max_epochs".
    """
    config = re.search(r"unrecognized arguments: ([^-\s]\S*\.ya?ml)\b", message)
    if config and "--config" in flags:
        return f"; did you mean --config {config[1]}?"
    match = re.search(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", message)
    return nearest_name(match[1] or match[2], [flag.lstrip("-") for flag in flags]) if match else ""


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse's parser, with one-line errors."""


def run_function(function: Callable[..., Any], command: str, args: list[str]) -> Any:
    """Call a function with arguments parsed by its signature; its docstring is the ``--help`` text.

    A list without a default takes all that is typed without a flag, a bool is switched on by its flag alone, and flags
    may be written with dashes for underscores.
    """
    summary = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    parameters = inspect.signature(function).parameters.values()
    lists: set[str | int] = {
        one.name for one in parameters if str(one.annotation).startswith("list") and one.default is one.empty
    }
    parser = Parser(
        prog=f"python -m digitnet {command}", description=summary, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=lists)
    for text in parse(inspect.getdoc(function) or "").params:
        if text.arg_name in lists:
            parser.add_argument(text.arg_name, nargs="+", type=str, help=text.description)
    switches = {f"--{one.name}" for one in parameters if one.annotation == "bool"}
    end = args.index("--") if lists and "--" in args else len(args)
    args, rest = args[:end], args[end + 1 :]  # what follows -- has no flags
    loose: list[str] = []  # what has no flag
    typed: list[str] = []
    is_value = False
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        if arg.startswith("--") and not is_value:
            name, equals, value = arg.partition("=")
            arg = name.replace("-", "_").replace("__", "--", 1) + equals + value
            if arg in switches and following not in ("true", "false"):
                arg += "=true"
            is_value = "=" not in arg
            typed.append(arg)
        else:
            # argparse would take what stands in one place only.
            (loose if lists and not is_value else typed).append(arg)
            is_value = False
    typed = [*typed, "--", *loose, *rest] if rest else [*loose, *typed]
    return function(**vars(parser.instantiate(parser.parse_args(typed))))
