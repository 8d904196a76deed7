r"""How well single latent dimensions stand for the known factors of the data.

Four scores of codes ``c``, ``(N, L)``, against factors ``v``, ``(N, K)`` whole numbers; each is 1
for codes whose dimensions are the factors and low where they know nothing of them.

- MIG, the mutual information gap (Chen et al. 2018): mean over k of
  ``[I(c_j1; v_k) - I(c_j2; v_k)] / H(v_k)``, j1 and j2 the two dimensions that know most of k.
- DCI (Eastwood & Williams 2018), from the importance ``R[j, k]`` of dimension j for predicting
  factor k: *disentanglement*, ``1 - H_K(R[j, :])`` weighted by the share of j in all importance;
  *completeness*, ``1 - H_L(R[:, k])``, mean over k; *informativeness*, the accuracy on held-out
  data.
- SAP, the separated attribute predictability (Kumar et al. 2018): the mean over k of the gap
  between the two dimensions that predict factor k best by thresholds.
- FactorVAE (Kim & Mnih 2018): the accuracy of the majority vote that tells which factor was held
  fixed from the dimension that varied least.

Implementations differ in their estimators, and scores with them; ours are stated at each function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pvae.errors import DataError, OptionError

__all__ = ["Dci", "Disentanglement", "dci", "disentanglement", "factor_vae", "mig", "sap"]

Array = NDArray[Any]

_TREES = 20
_LEAF = 5  # rows in a leaf at least, so that trees do not learn rows by heart
_COLLAPSED = 0.05  # share of the largest standard deviation below which a dimension is left out


@dataclass(frozen=True)
class Dci:
    """Disentanglement, completeness and informativeness.

    Attributes:
        disentanglement: Whether a dimension serves one factor.
        completeness: Whether a factor is served by one dimension.
        informativeness: Mean over the factors of the accuracy on held-out data, corrected for
            chance: 0 is the most frequent value, 1 all right.
        importance: ``(L, K)``, each column sums to one (or is zero).
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Array


@dataclass(frozen=True)
class Disentanglement:
    """The four scores of one set of codes.

    Attributes:
        mig: Mutual information gap.
        dci: Disentanglement, completeness, informativeness.
        sap: Separated attribute predictability.
        factor_vae: Accuracy of the majority vote; ``1 / K`` is chance.
        num_data: N.
    """

    mig: float
    dci: Dci
    sap: float
    factor_vae: float
    num_data: int

    def rows(self) -> dict[str, float]:
        """Score -> value."""
        return {
            "MIG": self.mig,
            "DCI disentanglement": self.dci.disentanglement,
            "DCI completeness": self.dci.completeness,
            "DCI informativeness": self.dci.informativeness,
            "SAP": self.sap,
            "FactorVAE": self.factor_vae,
        }

    def report(self) -> str:
        """One line per score."""
        return "\n".join(f"{name:<20} {value:.3f}" for name, value in self.rows().items())

    __str__ = report


def disentanglement(codes: Any, factors: Any, *, seed: int = 0) -> Disentanglement:
    """All scores of codes ``(N, L)`` against factors ``(N, K)``.

    Args:
        codes: Real numbers, posterior means say.
        factors: Whole numbers; a vector is one factor.
        seed: Of held-out rows, trees and votes.

    Raises:
        DataError: Not finite, of another length, too few rows, or a factor of one value.
    """
    return Disentanglement(
        mig(codes, factors),
        dci(codes, factors, seed=seed),
        sap(codes, factors, seed=seed),
        factor_vae(codes, factors, seed=seed),
        len(_checked(codes, factors)[0]),
    )


def mig(codes: Any, factors: Any, *, bins: int = 20) -> float:
    """The mutual information gap: ``(N, L), (N, K) -> [0, 1]``.

    Mutual information is the plug-in estimate on each dimension cut into ``bins`` bins of equal
    width between its extremes (Locatello et al. 2019), of the codes as they are given: posterior
    means, where Chen et al. take the density of the whole posterior.

    Raises:
        DataError: As :func:`disentanglement`.
        OptionError: ``bins`` is below two.
    """
    if bins < 2:
        raise OptionError(f"bins must be at least 2, got {bins}")
    table, values = _checked(codes, factors)
    information = np.array([[_information(_binned(c, bins), v) for v in values.T] for c in table.T])
    entropies = np.array([_entropy(np.bincount(v)) for v in values.T])
    return float((_gaps(information) / entropies).mean())


def dci(codes: Any, factors: Any, *, seed: int = 0) -> Dci:
    """Disentanglement, completeness, informativeness: ``(N, L), (N, K)``.

    The predictor of each factor is a random forest of scikit-learn: 20 trees, all dimensions
    offered at every split (so that one that knows nothing is never preferred), at least five rows
    in a leaf; its importance is the decrease of the Gini impurity. It is fitted on a random half of
    the rows; the other half judges. Eastwood & Williams report errors where we report accuracies.

    Raises:
        DataError: As :func:`disentanglement`.
    """
    from sklearn.ensemble import RandomForestClassifier

    table, values = _checked(codes, factors)
    train, test = _halves(len(table), seed)
    columns, accuracies = [], []
    for factor in values.T:
        forest = RandomForestClassifier(
            _TREES, max_features=None, min_samples_leaf=_LEAF, random_state=seed
        ).fit(table[train], factor[train])
        columns.append(forest.feature_importances_)
        chance = (factor[test] == np.bincount(factor[train]).argmax()).mean()
        right = (forest.predict(table[test]) == factor[test]).mean()
        accuracies.append((right - chance) / (1 - chance) if chance < 1 else 0.0)
    importance = np.stack(columns, 1)
    by_dimension, by_factor = importance.sum(1), importance.sum(0)
    total = by_dimension.sum()
    if total == 0:
        return Dci(0.0, 0.0, float(np.mean(accuracies)), importance)
    purity = 1 - _normalised_entropy(importance)
    shares = 1 - _normalised_entropy(importance.T)
    return Dci(
        float((purity * by_dimension).sum() / total),
        float(np.where(by_factor > 0, shares, 0.0).mean()),
        float(np.mean(accuracies)),
        importance,
    )


def sap(codes: Any, factors: Any, *, seed: int = 0) -> float:
    """Separated attribute predictability: ``(N, L), (N, K)``.

    A dimension predicts a factor by thresholds (a tree of one leaf for each of its values, fitted
    to balanced classes on a random half of the rows). Its score is the balanced accuracy on the
    other half, corrected for chance (0 is guessing, 1 all right), so that a gap of 1 can be
    reached: without the correction gaps are smaller by the factor ``1 - 1/C`` for C values.

    Raises:
        DataError: As :func:`disentanglement`.
    """
    from sklearn.tree import DecisionTreeClassifier

    table, values = _checked(codes, factors)
    train, test = _halves(len(table), seed)
    scores = np.zeros((table.shape[1], values.shape[1]))
    for k, factor in enumerate(values.T):
        leaves = max(2, len(np.unique(factor[train])))
        for j in range(table.shape[1]):
            tree = DecisionTreeClassifier(
                max_leaf_nodes=leaves, class_weight="balanced", random_state=seed
            ).fit(table[train][:, [j]], factor[train])
            scores[j, k] = _balanced_accuracy(factor[test], tree.predict(table[test][:, [j]]))
    return float(_gaps(scores.clip(min=0)).mean())


def factor_vae(
    codes: Any, factors: Any, *, num_votes: int = 800, batch_size: int = 64, seed: int = 0
) -> float:
    """Accuracy of the majority vote of Kim & Mnih: ``(N, L), (N, K)``; ``1 / K`` is chance.

    For a vote, a factor k and one of its values are drawn, and ``batch_size`` rows of that value
    (with replacement); the vote is the dimension of the smallest variance, each divided by its
    variance over all rows. Each dimension stands for the factor that it got most votes for, among
    ``num_votes``; the accuracy is that on as many new votes. Dimensions whose standard deviation is
    below 5 % of the largest are left out, as collapsed; if all are constant, the score is 0.

    Raises:
        DataError: As :func:`disentanglement`.
        OptionError: ``num_votes`` is below one or ``batch_size`` below two.
    """
    if num_votes < 1 or batch_size < 2:
        raise OptionError(
            f"num_votes must be at least 1 and batch_size 2, got {num_votes} and {batch_size}"
        )
    table, values = _checked(codes, factors)
    spread = table.std(0)
    table = table[:, (spread > _COLLAPSED * spread.max()) & ~_constant(table)]
    if table.shape[1] == 0:
        return 0.0
    table = table / table.std(0)
    rng = np.random.default_rng(seed)
    rows_of = [[np.flatnonzero(v == value) for value in np.unique(v)] for v in values.T]
    tallies = []
    for _ in range(2):
        tally = np.zeros((table.shape[1], values.shape[1]))
        for _ in range(num_votes):
            k = rng.integers(values.shape[1])
            rows = rows_of[k][rng.integers(len(rows_of[k]))]
            batch = table[rng.choice(rows, batch_size)]
            tally[batch.var(0).argmin(), k] += 1
        tallies.append(tally)
    learned, judged = tallies
    return float(judged[np.arange(len(judged)), learned.argmax(1)].sum() / num_votes)


# --- parts ---------------------------------------------------------------------------------------


def _checked(codes: Any, factors: Any) -> tuple[Array, Array]:
    """Codes ``(N, L)`` float64; factors ``(N, K)`` numbered from zero."""
    table, values = _numpy(codes), _numpy(factors)
    values = values[:, None] if values.ndim == 1 else values
    if table.ndim != 2 or values.ndim != 2 or len(table) != len(values) or table.size == 0:
        raise DataError(
            f"codes (N, L) and factors (N, K) must have equally many rows, got {table.shape} and "
            f"{values.shape}"
        )
    if not np.isfinite(table).all():
        raise DataError(
            f"codes must be finite, got {int((~np.isfinite(table)).sum())} that are not"
        )
    if values.dtype.kind not in "biu":
        raise DataError(f"factors must be whole numbers, got {values.dtype}: number their values")
    numbered = np.stack([np.unique(v, return_inverse=True)[1].reshape(-1) for v in values.T], 1)
    for k, most in enumerate(numbered.max(0)):
        if most == 0:
            raise DataError(f"factor {k} has one value in all rows: leave it out")
    if len(table) < 4 * (numbered.max() + 1):
        raise DataError(
            f"{len(table)} rows are too few for factors of {numbered.max() + 1} values: give at "
            f"least {4 * (numbered.max() + 1)}"
        )
    return table.astype(float), numbered


def _numpy(values: Any) -> Array:
    array: Any = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array)


def _constant(table: Array) -> Array:
    # Rounding gives a constant such as 0.1 a tiny standard deviation.
    same: Array = table.max(0) == table.min(0)
    return same


def _binned(code: Array, bins: int) -> Array:
    low, high = code.min(), code.max()
    if low == high:
        return np.zeros(len(code), dtype=int)
    found: Array = np.minimum((code - low) / (high - low) * bins, bins - 1).astype(int)
    return found


def _entropy(counts: Array) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _information(a: Array, b: Array) -> float:
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    return _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint.reshape(-1))


def _gaps(scores: Array) -> Array:
    """``(L, K) -> (K,)``: the best dimension's score less the second's, zero if it is alone."""
    padded = np.concatenate([scores, np.zeros((1, scores.shape[1]))])
    ordered = np.sort(padded, 0)
    return np.asarray(ordered[-1] - ordered[-2])


def _normalised_entropy(weights: Array) -> Array:
    """``(n, m) -> (n,)``: entropy of each row over ``log m``; one for a row of zeros."""
    if weights.shape[1] == 1:
        return np.zeros(len(weights))
    entropies = [
        _entropy(row) / math.log(weights.shape[1]) if row.sum() > 0 else 1.0 for row in weights
    ]
    return np.array(entropies)


def _halves(count: int, seed: int) -> tuple[Array, Array]:
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // 2], order[count // 2 :]


def _balanced_accuracy(truth: Array, predicted: Array) -> float:
    """Mean recall over the values that occur, with chance at zero."""
    recalls = [(predicted[truth == value] == value).mean() for value in np.unique(truth)]
    chance = 1 / len(recalls)
    return float((np.mean(recalls) - chance) / (1 - chance)) if len(recalls) > 1 else 0.0
