"""Measured times on disk: one small file for each machine and bucket of problems, read by every later process.

    <folder>/<fingerprint of the machine>/<hash of the key>.json
    {"format": 2, "machine": {...}, "key": {...}, "results": [{"q_len", "kv_len", "sdpa_ms", "kernels", "failed"}]}

Files are replaced as a whole, so a reader never sees half of one. Of two processes that write at once the later wins; what the
other measured is measured again when it is next asked for. A file that cannot be read, or holds something else, counts as
absent. Where the folder cannot be written, results are lost and compiling goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sage_inductor.kernels.cache_folder import default_folder, expanded
from sage_inductor.kernels.files import read_regular, replace_file
from sage_inductor.measurement.printable import printable_line
from sage_inductor.tuning.comparison import BUCKET_WIDTH
from sage_inductor.tuning.machine import Machine

log = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**20  # a result is half a kilobyte, a bucket of lengths has a few hundred of them at most
FORMAT = 2


@dataclass(frozen=True)
class Timing:
    """One kernel against SDPA: `ms` per call, `ratio` of its time to SDPA's, `noise` of that ratio.

    With a bool mask these are the figures for a mask as models have it (`measure.usual_mask`), and they decide.
    `scattered` is the ratio for a mask that leaves keys drawn at random; None without a bool mask.
    """

    ms: float
    ratio: float
    noise: float
    scattered: float | None = None


@dataclass(frozen=True)
class Result:
    """The times measured at one pair of lengths. `failed` has the error of each kernel that raised one."""

    q_len: int
    kv_len: int
    sdpa_ms: float
    kernels: Mapping[str, Timing] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def decides(self, q_len: int, kv_len: int, names: Collection[str]) -> bool:
        """Whether this settles the choice among the kernels `names` at these lengths, which are of its bucket.

        Quantising takes time in proportion to q_len and kv_len, attention in proportion to their product. So where lengths
        change by less than a factor of 5/4, the ratio of a kernel's time to SDPA's does, too. A ratio beyond 5/4 either way
        holds for the whole bucket; nearer to 1 every pair of lengths is measured.
        """
        if not {*self.kernels, *self.failed}.issuperset(names):
            return False
        if (self.q_len, self.kv_len) == (q_len, kv_len):
            return True
        best = min((self.kernels[name].ratio for name in names if name in self.kernels), default=math.inf)
        return best * BUCKET_WIDTH <= 1 or best >= BUCKET_WIDTH

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Result:
        """The result in JSON data. Raises some Exception for data that is no result."""
        kernels = {
            str(name): Timing(
                ms=float(timing["ms"]),
                ratio=float(timing["ratio"]),
                noise=float(timing["noise"]),
                scattered=None if timing["scattered"] is None else float(timing["scattered"]),
            )
            for name, timing in dict(data["kernels"]).items()
        }
        failed = {str(name): str(text) for name, text in dict(data["failed"]).items()}
        result = cls(int(data["q_len"]), int(data["kv_len"]), float(data["sdpa_ms"]), kernels, failed)
        times = [
            result.sdpa_ms,
            *(value for timing in kernels.values() for value in (timing.ms, timing.ratio)),
            *(timing.scattered for timing in kernels.values() if timing.scattered is not None),
        ]
        if not all(math.isfinite(time) and time > 0 for time in times):
            raise ValueError("a time that is not finite and positive")
        if not all(math.isfinite(timing.noise) and timing.noise >= 0 for timing in kernels.values()):
            raise ValueError("a noise that is not finite, or negative")
        if not all(1 <= length < 2**63 for length in (result.q_len, result.kv_len)):
            raise ValueError("a length that no tensor has")
        return result


class Store:
    """The results of one folder (None: the default one) for one machine."""

    def __init__(self, folder: str | None, machine: Machine) -> None:
        self.machine = machine
        self.folder: Path | None = None
        try:
            base = default_folder() if folder is None else expanded(folder)
            self.folder = base / machine.fingerprint()
        except RuntimeError as error:
            _warn("no folder for measured times: %s", error)

    def load(self, key: dict[str, Any]) -> list[Result]:
        """The results stored under `key`; none where there is no readable file."""
        if self.folder is None:
            return []
        file = self.folder / _file_name(key)
        try:
            data = json.loads(read_regular(file, MOST_BYTES))
            if data["format"] != FORMAT or data["key"] != key:
                raise ValueError("of another format or key")
            return [Result.of_json(result) for result in data["results"]]
        except FileNotFoundError:
            return []
        except (
            Exception
        ) as error:  # JSON may hold anything: 1e999 for a length, a thousand brackets in one another
            text = f"{type(error).__name__}: {error}"[:200]
            _warn("measured times in %s are not readable, and measured again: %s", file, text)
            return []

    def save(self, key: dict[str, Any], result: Result) -> None:
        """Add `result` to those under `key`, in place of one of the same lengths."""
        if self.folder is None:
            return
        lengths = result.q_len, result.kv_len
        results = [other for other in self.load(key) if (other.q_len, other.kv_len) != lengths]
        data = {
            "format": FORMAT,
            "machine": asdict(self.machine),
            "key": key,
            "results": [asdict(other) for other in (*results, result)],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The permissions are those that the umask leaves: a folder may serve a group.
            replace_file(self.folder / _file_name(key), json.dumps(data, indent=1).encode())
        except OSError as error:
            _warn("measured times are not kept: %s", error)


def _file_name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"


_warned: set[str] = set()


def _warn(message: str, *args: object) -> None:
    """Warn once for each kind of message: a folder that is not writable concerns every site of every graph."""
    if message not in _warned:
        _warned.add(message)
        log.warning(message, *(printable_line(str(arg)) for arg in args))
