"""Estimates of the log evidence ``log p(x)``, per datum, and diagnoses of a pair."""

from __future__ import annotations

from pvae.evidence.annealing import annealed
from pvae.evidence.calibration import (
    Calibration,
    PredictiveChecks,
    calibration,
    predictive_checks,
)
from pvae.evidence.escalation import (
    Curve,
    Rung,
    auto,
    curve_cost,
    escalation_report,
    log_evidence_curve,
    measured_curve,
    standard_ladder,
)
from pvae.evidence.filtering import filtered
from pvae.evidence.gaps import Gaps, gaps
from pvae.evidence.importance import Evidence, importance
from pvae.evidence.information import Dimension, Information, information
from pvae.evidence.sandwich import Sandwich, Simulated, importance_upper, sandwich, simulate
from pvae.evidence.smc import smc
from pvae.evidence.spread import in_parts

__all__ = [
    "Calibration",
    "Curve",
    "Dimension",
    "Evidence",
    "Gaps",
    "Information",
    "PredictiveChecks",
    "Rung",
    "Sandwich",
    "Simulated",
    "annealed",
    "auto",
    "calibration",
    "curve_cost",
    "escalation_report",
    "filtered",
    "gaps",
    "importance",
    "importance_upper",
    "in_parts",
    "information",
    "log_evidence_curve",
    "measured_curve",
    "predictive_checks",
    "sandwich",
    "simulate",
    "smc",
    "standard_ladder",
]
