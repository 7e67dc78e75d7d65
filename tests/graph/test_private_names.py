"""Private names of Triton, of diffusers and of transformers stand in one module each, those of torch in one room."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = {
    "torch": "sage_inductor/torch_internals/",
    "triton": "sage_inductor/kernels/triton/internals.py",
    "diffusers": "sage_inductor/integrations/diffusers/internals.py",
    "transformers": "sage_inductor/integrations/transformers/internals.py",
}
# Of Triton: what its documentation and tutorials use. All else may change with any version.
PUBLIC_OF_TRITON = (
    "triton.jit",
    "triton.cdiv",
    "triton.next_power_of_2",
    "triton.Config",
    "triton.JITFunction",
    "triton.__version__",
    "triton.language",
    "triton.testing.do_bench",
    "triton.tools.tensor_descriptor.TensorDescriptor",
)
# Private attributes that other packages' models and kernels are asked for, by name.
OF_OTHERS = {
    "_attn_fwd",  # sageattention 1's kernel
    "_repeated_blocks",  # by which models of diffusers name the blocks that `compile_repeated_blocks` compiles
}
# Operators' names say what they compute, and an underscore in front belongs to some.
OPERATORS = "torch.ops."


def private_names(source: str, own: Set[str] = frozenset(OF_OTHERS)) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of torch and Triton in a module's source: imported, by dots, or in `getattr`; and
    of private attributes of objects that are not among the package's `own`."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or name] = name
                yield from _found(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _found(node.lineno, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = _dotted(node.value, bound)
            if name is not None and name.startswith(("torch.", "triton.")):
                bound[node.targets[0].id] = name
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node, bound)
            if name is not None and node not in inner:
                yield from _found(node.lineno, name)
            elif name is None and _is_private(node.attr) and node.attr not in own:
                yield node.lineno, f"?.{node.attr}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr")
        ):
            of, attribute = node.args[:2]
            text = attribute.value if isinstance(attribute, ast.Constant) else ""
            name = _dotted(of, bound)
            if name is not None:
                yield from _found(node.lineno, f"{name}.{text}")
            elif _is_private(text) and text not in own:
                yield node.lineno, f"?.{text}"


def _dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    """`torch.nn.functional.relu` of `F.relu`; None of what does not begin with an imported name."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value, bound)) is not None:
        return f"{base}.{node.attr}"
    return None


def _own_names(tree: ast.AST) -> Iterator[str]:
    """What the module itself defines, or sets on its objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _found(line: int, name: str) -> Iterator[tuple[int, str]]:
    package, *rest = name.split(".")
    if package == "torch" and not name.startswith(OPERATORS) and any(map(_is_private, rest)):
        yield line, name
    allowed = any(
        name == public or name.startswith(f"{public}.") or public.startswith(f"{name}.")
        for public in PUBLIC_OF_TRITON
    )
    if package == "triton" and name != "triton" and not (allowed and not any(map(_is_private, rest))):
        yield line, name


def test_private_names_stand_at_home() -> None:
    paths = [path for folder in ("sage_inductor", "patterns") for path in (ROOT / folder).rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    homes = tuple(HOME.values())
    own = OF_OTHERS.union(
        *(_own_names(ast.parse(source)) for path, source in sources.items() if not path.startswith(homes))
    )
    astray = []
    for path, source in sources.items():
        at_home = tuple(f"{package}." for package, home in HOME.items() if path.startswith(home))
        if at_home in (("torch.",), ("diffusers.",), ("transformers.",)):
            at_home += ("?.",)  # attributes of their objects
        found = private_names(source, own)
        astray += [f"{path}:{line} {name}" for line, name in found if not name.startswith(at_home)]
    assert len(sources) > 100 and astray == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._inductor import config", "torch._inductor.config"),
        ("def f():\n  from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("import torch\ntorch._C.DispatchKeySet()", "torch._C.DispatchKeySet"),
        ("import torch._dynamo as dynamo\ndynamo.reset()", "torch._dynamo.reset"),
        ("from torch import fx\nfx._symbolic_trace.Tracer", "torch.fx._symbolic_trace.Tracer"),
        ("import torch\ngetattr(torch, '_dynamo')", "torch._dynamo"),
        ("def f(node):\n  return node._erased", "?._erased"),
        ("def f(node):\n  return getattr(node, '_erased')", "?._erased"),
        ("from triton.backends.nvidia import driver", "triton.backends.nvidia.driver"),
        ("import triton\ntriton.runtime.driver.active", "triton.runtime.driver.active"),
        ("import triton\ntriton.knobs.runtime.interpret", "triton.knobs.runtime.interpret"),
        ("import triton.language as tl\ntl._internal", "triton.language._internal"),
    ],
)
def test_a_private_name_is_found(source: str, name: str) -> None:
    assert name in [found for _, found in private_names(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\naten = torch.ops.aten\naten._softmax.default",
        "import torch\ntorch.__version__",
        "import torch.nn.functional as F\nF.softmax(x, -1)",
        "import triton\nimport triton.language as tl\n@triton.jit\ndef f(x):\n  tl.load(x)",
        "class A:\n  def __init__(self):\n    self.__dict__['x'] = 1",
    ],
)
def test_public_names_are_none(source: str) -> None:
    assert list(private_names(source)) == []
