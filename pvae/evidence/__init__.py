"""Estimates of the log evidence ``log p(x)`` of a pair, per datum, each with its error."""

from __future__ import annotations

from pvae.evidence.annealing import annealed
from pvae.evidence.importance import Evidence, importance
from pvae.evidence.sandwich import Sandwich, Simulated, importance_upper, sandwich, simulate
from pvae.evidence.smc import smc

__all__ = [
    "Evidence",
    "Sandwich",
    "Simulated",
    "annealed",
    "importance",
    "importance_upper",
    "sandwich",
    "simulate",
    "smc",
]
