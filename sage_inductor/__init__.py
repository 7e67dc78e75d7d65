"""8-bit attention for people who use `torch.compile`: finds, judges, substitutes and reports every attention."""

from typing import TYPE_CHECKING, Any

from sage_inductor import backends, kernels
from sage_inductor.backend import enabled, explain, rewrite_exported
from sage_inductor.calibration import calibrate
from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.functional import sage_attention
from sage_inductor.plan import Plan
from sage_inductor.report import Report, Site
from sage_inductor.stepped import SteppedModel, compile_steps

if TYPE_CHECKING:
    from sage_inductor.graph_pass import SageAttentionPass

__all__ = [
    "Config",
    "NotEligibleError",
    "Plan",
    "Report",
    "SageAttentionPass",
    "Site",
    "SteppedModel",
    "backends",
    "calibrate",
    "compile_steps",
    "enabled",
    "explain",
    "kernels",
    "rewrite_exported",
    "sage_attention",
]


def __getattr__(name: str) -> Any:
    """`SageAttentionPass` on first use: its base class is Inductor's, whose import takes seconds and brings triton."""
    if name == "SageAttentionPass":
        from sage_inductor.graph_pass import SageAttentionPass

        return SageAttentionPass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
