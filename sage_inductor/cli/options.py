"""Arguments that several commands share, among them one for every field of Config."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from sage_inductor import kernels
from sage_inductor.cli.errors import CommandError
from sage_inductor.config import Config

CONFIG_PREFIX = "config_"  # of the names that fields of Config have among the parsed arguments


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda or cuda:N (default here: %(default)s)")


def chosen_device(options: argparse.Namespace) -> torch.device:
    """The device of `--device`. Raises CommandError for one that this machine does not have."""
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise CommandError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {options.device} (valid: cpu, cuda, cuda:N)")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise CommandError(f"--device {options.device}: torch sees {gpus} CUDA device(s)")
    return device


def add_kernels(parser: argparse.ArgumentParser, help_text: str, *others: str) -> None:
    """Add `--kernel NAME`, which may be repeated. NAME is a kernel, or one of `others`."""
    names = (*others, *kernels.KERNELS)
    parser.add_argument(
        "--kernel",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"{help_text}; of {', '.join(names)}; may be repeated",
    )


def config_fields(*but: str) -> tuple[str, ...]:
    """The names of Config's fields, without some."""
    return tuple(field.name for field in fields(Config) if field.name not in but)


def add_config(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add `--<field>` for these fields of Config, with their docstrings as help. Only those that are given are set."""
    group = parser.add_argument_group("options of sage_inductor.Config")
    hints, texts = get_type_hints(Config), _field_docs()
    for name in names:
        flag, hint = "--" + name.replace("_", "-"), hints[name]
        shared: dict[str, Any] = {"dest": CONFIG_PREFIX + name, "default": argparse.SUPPRESS}
        shared["help"] = texts.get(name, "").replace("%", "%%")
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif get_origin(hint) is tuple:
            group.add_argument(flag, action="append", metavar="VALUE", **shared)
        else:
            group.add_argument(flag, type=_parser_of(hint), metavar="VALUE", **shared)


def chosen_config(options: argparse.Namespace) -> Config:
    """The Config of the options that are given. Raises CommandError for a value that Config refuses."""
    given = {
        name.removeprefix(CONFIG_PREFIX): value
        for name, value in vars(options).items()
        if name.startswith(CONFIG_PREFIX)
    }
    try:
        return Config(**given)
    except (ValueError, TypeError, OSError) as error:
        raise CommandError(str(error)) from None


def _parser_of(hint: Any) -> Any:
    """The function from text to a value: int or float where only a number is valid, else str."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    members = set(get_args(hint)) - {type(None)} if is_union else {hint}
    for number in (int, float):
        if members == {number}:
            return number
    return str


def _field_docs() -> dict[str, str]:
    """The docstring below each field of Config, on one line."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(Config))).body
    assert isinstance(cls, ast.ClassDef)
    docs = {}
    for field, below in zip(cls.body, cls.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
        ):
            text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
            docs[field.target.id] = " ".join(str(text).split())
    return docs
