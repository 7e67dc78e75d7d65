"""The ways in which attention is written, one idiom per file; `ALL` lists them in the order they are tried."""

if __name__ != "sage_inductor.patterns":
    raise ImportError(
        f"this folder is the package sage_inductor.patterns, but was imported as {__name__!r}; a second copy of its "
        "patterns would not be the one in use. Import sage_inductor.patterns."
    )

from sage_inductor.call import Pattern
from sage_inductor.patterns.sdpa import ScaledDotProductAttention

ALL: tuple[Pattern, ...] = (ScaledDotProductAttention(),)

__all__ = ["ALL", "ScaledDotProductAttention"]
