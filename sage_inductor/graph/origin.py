"""Where in the model a node comes from."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from torch import fx

_SUBSCRIPT = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+)\]""")
# Dynamo reaches the children of a module that has a __getattr__ of its own through its __dict__.
_CHILDREN = re.compile(r"(\.__dict__)?\._modules(?=\.)")


def module_path(node: fx.Node) -> str:
    """ "blocks.0.attn1" from the metadata of Dynamo or export; "<root>" outside any submodule."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "<root>"
    path = str(list(stack.values())[-1][0])
    if path.startswith(
        ("L[", "G[")
    ):  # as Dynamo writes it: the local or global variable that holds the model first
        names = _SUBSCRIPT.sub(lambda subscript: f".{ast.literal_eval(subscript[1])}", path[1:])
        path = _CHILDREN.sub("", names).lstrip(".").partition(".")[2]
    return path or "<root>"


def source_line(node: fx.Node) -> str:
    """ "file.py:123", the innermost frame of user code that made the call."""
    frame, _ = _innermost_frame(node)
    if frame is None:
        return "?"
    file, _, rest = frame.removeprefix('File "').partition('", line ')
    return f"{Path(file).name}:{rest.partition(',')[0]}"


def source_code(node: fx.Node) -> str:
    """The text of that line; empty where its file was not at hand."""
    return _innermost_frame(node)[1]


def _innermost_frame(node: fx.Node) -> tuple[str | None, str]:
    """('File "model.py", line 123, in forward', "the text of that line") of the stack trace."""
    frame, text = None, ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        if line.strip().startswith('File "'):
            frame, text = line.strip(), ""
        elif frame is not None and not text:
            text = line.strip()
    return frame, text
