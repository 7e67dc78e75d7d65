"""The errors the package raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence


class NotEligibleError(ValueError):
    """An attention call cannot be served as it was asked for.

    Raised for a kernel that was requested by name and cannot run, and, under `Config(fallback="error")`, for
    any site that stays SDPA. `site` names the call, `reasons` holds every reason: each one gives the
    offending value and what is supported, e.g. `head_dim=80 (supported: 64, 128)`.
    """

    def __init__(self, site: str, reasons: Sequence[str]) -> None:
        self.site = site
        self.reasons = tuple(reasons)
        super().__init__(f"{site}: " + "; ".join(self.reasons))

    def __reduce__(self) -> tuple[type[NotEligibleError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.site, self.reasons)
