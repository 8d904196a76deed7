"""EM of the mixtures against scikit-learn's, interleaved in one process: seconds, and their ratio.

    PVAE_DATA=... python benchmarks/em.py              # diagonal mixture, K = 50, grey MNIST
    PVAE_DATA=... python benchmarks/em.py --factors    # and factor analysers, K = 20, 10 factors
    PVAE_DATA=... python benchmarks/em.py --device cuda

Both do ten iterations from one start, on the same float32 rows (50,000 x 784). The first round is
not counted; medians of the others.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.mixture import GaussianMixture as SklearnMixture

import pvae
from pvae.baselines import GaussianMixture, MixtureOfFactorAnalyzers


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def against_scikit_learn(x: torch.Tensor, options: argparse.Namespace) -> None:
    start = GaussianMixture(50, covariance_type="diag", max_iterations=1, tolerance=0).fit(x)
    moved, rows = x.to(options.device), x.numpy()

    def ours() -> Any:
        mixture = GaussianMixture(
            50, covariance_type="diag", start=start, max_iterations=10, tolerance=0
        )
        return mixture.fit(moved)

    def theirs() -> Any:
        mixture = SklearnMixture(
            50, covariance_type="diag", max_iter=10, tol=0, weights_init=start.weights.numpy(),
            means_init=start.means.numpy(), precisions_init=1 / start.covariances.numpy(),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mixture.fit(rows)

    seconds: dict[str, list[float]] = {"pvae": [], "scikit-learn": []}
    for round_number in range(options.rounds + 1):
        for name, work in (("pvae", ours), ("scikit-learn", theirs)):
            elapsed, fitted = timed(work)
            if round_number:
                seconds[name].append(elapsed)
            elif name == "pvae":
                mine = fitted.objective
            else:
                print(f"objective after 10 iterations {mine:.3f}, score of theirs ", end="")
                print(f"{fitted.score(rows):.3f} nats per datum")
    ratios = [a / b for a, b in zip(seconds["pvae"], seconds["scikit-learn"], strict=True)]
    for name, values in seconds.items():
        print(f"{name:13} {statistics.median(values):7.2f} s", [round(v, 2) for v in values])
    print(f"ratio {statistics.median(ratios):.2f} (rounds {[round(r, 2) for r in ratios]})")


def factor_analysers(splits: Any, options: argparse.Namespace) -> None:
    x, test = splits.train.x.to(options.device), splits.test
    mixture = MixtureOfFactorAnalyzers(
        20, num_factors=10, max_iterations=options.iterations, tolerance=0.1
    )
    elapsed, _ = timed(lambda: mixture.fit(x))
    log_p = mixture.score_samples(test.x.to(options.device)).cpu() + test.log_det
    stderr = float(log_p.std()) / len(log_p) ** 0.5
    print(
        f"factor analysers, K = 20, q = 10: {len(mixture.history) - 1} iterations in {elapsed:.0f} "
        f"s, test log p {float(log_p.mean()):.1f} +- {stderr:.1f} nats on the scale 0..255"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=50, help="most, of --factors")
    parser.add_argument("--factors", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if "PVAE_DATA" not in os.environ:
        parser.error("set PVAE_DATA to the folder that holds mnist")
    splits = pvae.data.load("mnist", transform="dequantize")
    print(f"{torch.get_num_threads()} threads, {options.device}, torch {torch.__version__}")
    against_scikit_learn(splits.train.x, options)
    if options.factors:
        factor_analysers(splits, options)


if __name__ == "__main__":
    main()
