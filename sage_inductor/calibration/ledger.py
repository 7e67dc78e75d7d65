"""What a calibration has measured so far, on disk: after an interruption it goes on where it stopped.

    {"format": "sage_inductor.calibration", "of": <digest of model, samples and settings>}
    {"key": "phase 0, sample 3", "value": ...}

Each sample, and each effect on the output, has a line. A file of another digest counts as absent, and so does everything
from the first line on that cannot be read. The tolerance and the metric are not part of the digest: what is measured does not
depend on them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sage_inductor.kernels.files import PathName, check_target, read_regular, replace_file

FORMAT = "sage_inductor.calibration"
MOST_BYTES = 2**30
SAMPLED = 4096  # elements of a tensor, evenly spaced, in its digest: so many, or up to twice that


class Ledger:
    """Values by key, kept in the file `path`; None keeps nothing. Raises OSError where the file cannot be written."""

    def __init__(self, path: PathName | None, identity: str) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        if path is None:
            return
        header = {"format": FORMAT, "of": identity}
        check_target(path)
        with contextlib.suppress(OSError):
            first, *lines = read_regular(path, MOST_BYTES).splitlines()
            with contextlib.suppress(Exception):  # a line that was cut, or is none of ours
                if json.loads(first) == header:
                    for line in lines:
                        data = json.loads(line)
                        self._values[str(data["key"])] = data["value"]
        known = [header, *({"key": key, "value": value} for key, value in self._values.items())]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in known).encode())

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value that JSON has. Raises OSError where the file cannot be written any more."""
        if self.path is not None and self._values.get(key) != value:
            self._values[key] = value
            with open(self.path, "ab") as file:
                file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")

    def remove(self) -> None:
        """Remove the file, once the plan is made."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def identity(model: Any, settings: Iterable[Any], samples: Iterable[Any]) -> str:
    """A digest of what measurements depend on: the names, shapes, dtypes and some elements of all parameters, buffers and
    inputs, and the reprs of `settings`."""
    state = [*model.named_parameters(), *model.named_buffers()] if isinstance(model, nn.Module) else []
    name = getattr(model, "__qualname__", type(model).__qualname__)
    described = [name, *map(repr, settings), *map(_described, state), *map(_described, samples)]
    return hashlib.sha256("\n".join(described).encode("utf-8", "backslashreplace")).hexdigest()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        some = value.detach().flatten()[:: max(1, value.numel() // SAMPLED)]
        with contextlib.suppress(
            RuntimeError, TypeError, NotImplementedError
        ):  # meta, quantised and other tensors
            some = some.cpu().to(torch.complex128 if some.is_complex() else torch.float64)
            digest = hashlib.sha256(some.numpy().tobytes()).hexdigest()
            return f"{tuple(value.shape)} {value.dtype} {digest}"
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return repr({str(key): _described(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return repr([_described(item) for item in value])
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__qualname__
