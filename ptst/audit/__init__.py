"""Checks of what reaches the loss: rules, findings, reports.

from ptst.audit import check_batch      # any trainer's batch, without a model (`ptst.audit.batches.check`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptst.audit.batches.check import check_batch as check_batch

__all__ = ["check_batch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ptst.audit.batches import check

        return getattr(check, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
