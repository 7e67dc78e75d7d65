"""8-bit attention for people who use `torch.compile`: finds, judges, substitutes and reports every
attention."""

from sage_inductor import backends, kernels
from sage_inductor.backend import enabled, explain, rewrite_exported
from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.functional import sage_attention
from sage_inductor.graph_pass import SageAttentionPass
from sage_inductor.report import Report, Site

__all__ = [
    "Config",
    "NotEligibleError",
    "Report",
    "SageAttentionPass",
    "Site",
    "backends",
    "enabled",
    "explain",
    "kernels",
    "rewrite_exported",
    "sage_attention",
]
