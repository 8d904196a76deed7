"""Estimates of the log evidence ``log p(x)`` of a pair, per datum, each with its error."""

from __future__ import annotations

from pvae.evidence.importance import Evidence, importance

__all__ = ["Evidence", "importance"]
