"""The origin of a node: its module and its line of code in the model."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import fx

ROOT = "<root>"  # the path of the module or function that was compiled

_SUBSCRIPT = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+)\]""")
# Dynamo reaches the children of a module that has a __getattr__ of its own through its __dict__.
_CHILDREN = re.compile(r"(\.__dict__)?\._modules(?=\.)")
# A forward function that was replaced, as by hooks, leads back to the module by the bound method that it keeps.
_REPLACED_FORWARD = re.compile(r"(^|\.)forward\.(.*\.)?__self__(?=\.|$)")
# A wrapper of a forward function gets the model as an argument.
_ARGUMENT = re.compile(r"^(args\.\d+|kwargs\.\w+)(?=\.|$)")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


_OPERATORS = f'File "{Path(__file__).parent.parent / "operators"}{os.sep}'


@dataclass(frozen=True)
class Entry:
    """One of the modules whose forward function made a node."""

    path: str
    class_name: str
    module_id: int | None
    """Python's id of the module, as Dynamo tells it; None in an exported graph."""


def module_stack(node: fx.Node) -> tuple[Entry, ...]:
    """The modules whose forward functions made `node`, the innermost last, from the metadata of Dynamo or export."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        Entry(
            _clean(str(path)),
            cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2],
            int(digits) if (digits := str(key).partition("@")[0]).isdecimal() else None,
        )
        for key, (path, cls) in stack.items()
    )


def module_path(node: fx.Node) -> str:
    """ "blocks.0.attn1" from the metadata of Dynamo or export; "<root>" outside any submodule."""
    stack = module_stack(node)
    return stack[-1].path if stack else ROOT


def _clean(path: str) -> str:
    """`path` without the variable that holds the model, and without wrappers."""
    if path.startswith(
        ("L[", "G[")
    ):  # as Dynamo writes it: the local or global variable that holds the model first
        names = _SUBSCRIPT.sub(lambda subscript: f".{ast.literal_eval(subscript[1])}", path[1:])
        names = _CHILDREN.sub("", names).lstrip(".")
        argument = _ARGUMENT.match(names)
        path = names[argument.end() :].lstrip(".") if argument else names.partition(".")[2]
        path = _REPLACED_FORWARD.sub("", path).lstrip(".")
    return _WRAPPERS.sub("", path).lstrip(".") or ROOT


def source_line(node: fx.Node) -> str:
    """ "file.py:123" of the innermost frame of user code that made the call; "?" where it is not known."""
    frame, _ = _innermost_frame(node)
    if frame is None:
        return "?"
    file, _, rest = frame.removeprefix('File "').partition('", line ')
    return f"{Path(file).name}:{rest.partition(',')[0]}"


def source_code(node: fx.Node) -> str:
    """The text of that line; empty where its file was not at hand."""
    return _innermost_frame(node)[1]


def _innermost_frame(node: fx.Node) -> tuple[str | None, str]:
    """('File "model.py", line 123, in forward', "the text of that line") of the stack trace. Functions of this package that
    call its operator are no user code."""
    frame, text = None, ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        if line.strip().startswith('File "'):
            if frame is not None and line.strip().startswith(_OPERATORS):
                break
            frame, text = line.strip(), ""
        elif frame is not None and not text:
            text = line.strip()
    return frame, text
