"""8-bit attention for people who use `torch.compile`: finds, judges, substitutes and reports every attention."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_PATTERNS = Path(__file__).parent.parent / "patterns"


class _PatternsBesideTheSources(MetaPathFinder):
    """Finds `sage_inductor.patterns` in a clone, where patterns/ lies beside this folder, not inside it.

    Python started in the root of a clone finds the sources first, whatever is installed. (To search the root for all
    submodules would not do: it holds `sage_inductor` itself, so that whoever walks the package would never end.)
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        # Where a wheel lies on sys.path as it is, there is no folder at all.
        if fullname != "sage_inductor.patterns" or not _PATTERNS.is_dir():
            return None
        return spec_from_file_location(
            fullname, _PATTERNS / "__init__.py", submodule_search_locations=[str(_PATTERNS)]
        )


if not (Path(__file__).parent / "patterns").is_dir():
    sys.meta_path.insert(0, _PatternsBesideTheSources())

from sage_inductor import backends, integrations, kernels
from sage_inductor.backend import enabled, explain, rewrite_exported
from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.operators.functional import sage_attention
from sage_inductor.operators.halves import QuantizedKeyValue, attention_prequantized, quantize_key_value
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.stepped import SteppedModel, compile_steps
from sage_inductor.report.report import Report
from sage_inductor.report.site import Site

if TYPE_CHECKING:
    from sage_inductor.calibration.calibrate import calibrate
    from sage_inductor.rewriting.graph_pass import SageAttentionPass

__all__ = [
    "Config",
    "NotEligibleError",
    "Plan",
    "QuantizedKeyValue",
    "Report",
    "SageAttentionPass",
    "Site",
    "SteppedModel",
    "__version__",
    "attention_prequantized",
    "backends",
    "calibrate",
    "compile_steps",
    "enabled",
    "explain",
    "integrations",
    "kernels",
    "quantize_key_value",
    "rewrite_exported",
    "sage_attention",
]


# Imported on first use. The pass's base class is Inductor's, whose import takes seconds and brings triton; few calibrate.
_ON_FIRST_USE = {
    "SageAttentionPass": "sage_inductor.rewriting.graph_pass",
    "calibrate": "sage_inductor.calibration.calibrate",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
