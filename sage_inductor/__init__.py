"""8-bit attention for people who use `torch.compile`: finds, judges, substitutes and reports every attention."""

from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.functional import sage_attention

__all__ = ["Config", "NotEligibleError", "sage_attention"]
