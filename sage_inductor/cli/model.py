"""Loading of FILE.py:FUNCTION, which gives a command its model and inputs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sage_inductor.cli.errors import FAILED, CommandError
from sage_inductor.cli.output import show_error
from sage_inductor.errors import NotEligibleError
from sage_inductor.torch_internals.traced import tensors_of

PACKAGE = Path(__file__).parent.parent
VALID = "(model, args), (model, kwargs) or (model, args, kwargs), args a tuple or list, kwargs a dict"


@dataclass(frozen=True)
class Subject:
    """A model and one set of inputs: `model(*args, **kwargs)`."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: Callable[..., Any] | None = None) -> Any:
        """The output of the model, or of another one, such as its compiled form."""
        return (self.model if model is None else model)(*self.args, **self.kwargs)

    def sample(self) -> Any:
        """The inputs as one value: a tuple of positional ones, or a dict of keywords. Raises CommandError where there are both."""
        if self.args and self.kwargs:
            raise CommandError(
                "positional and keyword inputs together (valid: (model, args) or (model, kwargs))"
            )
        return dict(self.kwargs) if self.kwargs else self.args

    def tensors(self) -> list[Tensor]:
        return tensors_of((self.args, dict(self.kwargs)))


def add_model(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument(
        "model", nargs=nargs, metavar="FILE.py:FUNCTION",
        help=f"a function without arguments that returns {VALID}",
    )  # fmt: skip


def load(spec: str) -> Subject:
    """The model and inputs that FILE.py:FUNCTION returns. Raises CommandError for a file, function or return value that is not
    valid. An exception of the user's code is printed to stderr, and ends the command."""
    return _subject(spec, make(spec))


def make(spec: str) -> Any:
    """The value that FILE.py:FUNCTION returns. Raises CommandError as `load`."""
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise CommandError(f"{spec!r} (valid: FILE.py:FUNCTION)")
    path = Path(file)
    if "\0" in file or not path.is_file():
        raise CommandError(f"{file}: no such file")
    if path.suffix != ".py":
        raise CommandError(f"{file} is no Python file")
    with failing(f"{file} cannot be imported"):
        module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        raise CommandError(f"{file} has no function {name} (it has: {', '.join(functions) or 'none'})")
    with failing(f"{spec} raised"):
        return function()


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn exceptions of the user's code into a CommandError with their exit code, and print the traceback. ValueError and
    TypeError that the package itself raises about its arguments need no traceback. NotEligibleError passes."""
    try:
        yield
    except NotEligibleError:
        raise
    except SystemExit as stop:
        raise CommandError(f"{what}: it called sys.exit({stop.code!r})", FAILED) from None
    except Exception as error:
        if isinstance(error, (ValueError, TypeError)) and _is_ours(error):
            raise CommandError(str(error)) from None
        show_error(traceback.format_exc())
        raise CommandError(f"{what}: {type(error).__name__}: {error}", FAILED) from None


def _is_ours(error: Exception) -> bool:
    """Whether code of this package raised `error`, and not code that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def _import(path: Path) -> Any:
    """Import the file with the modules beside it, as `python FILE.py` would, but without running `__main__` guards. The module
    gets a name that no other has, because a file may be called json.py."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"sage_inductor model file {path.stem}"  # never "__main__", whatever the file is called
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _subject(spec: str, made: Any) -> Subject:
    fits = isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0])
    if not fits:
        raise CommandError(f"{spec} returned {_describe(made)} (valid: {VALID})")
    model, *inputs = made
    args = inputs[0] if len(inputs) == 2 or not isinstance(inputs[0], dict) else ()
    kwargs = inputs[-1] if len(inputs) == 2 or isinstance(inputs[0], dict) else {}
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise CommandError(f"{spec} returned {_describe(made)} (valid: {VALID})")
    return Subject(model, tuple(args), kwargs)


def _describe(made: Any) -> str:
    if isinstance(made, tuple):
        return "(" + ", ".join(type(item).__name__ for item in made) + ")"
    return type(made).__name__
