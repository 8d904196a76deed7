"""Mixture of Bernoullis on statically binarised MNIST: mean log p in nats, and seconds.

    OMP_NUM_THREADS=2 python benchmarks/bernoulli_mixture.py --components 500

The data are looked for under ``$PVAE_DATA/mnist_static_binary``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pvae.baselines import BernoulliMixture

_FILE = Path("mnist_static_binary") / "binarized_mnist_packed.npz"


def load() -> dict[str, Tensor]:
    root = os.environ.get("PVAE_DATA")
    if root is None or not (Path(root) / _FILE).exists():
        sys.exit(f"{_FILE} is not under PVAE_DATA={root}: set PVAE_DATA to the folder that has it")
    with np.load(Path(root) / _FILE) as packed:
        return {
            split: torch.from_numpy(np.unpackbits(packed[split], axis=1, count=784)).float()
            for split in ("train", "valid", "test")
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--components", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--smoothing", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    splits = load()
    mixture = BernoulliMixture(
        options.components,
        smoothing=options.smoothing,
        max_iterations=options.iterations,
        seed=options.seed,
    )
    start = time.perf_counter()
    mixture.fit(splits["train"])
    fitted = time.perf_counter() - start
    print(f"K {options.components}  iterations {len(mixture.history) - 1}", end="  ")
    print(f"smoothing {options.smoothing:g}  seed {options.seed}  converged {mixture.converged}")
    for split, x in splits.items():
        log_p = mixture.score_samples(x)
        stderr = float(log_p.std()) / math.sqrt(len(log_p))
        print(f"{split:5}  {float(log_p.mean()):9.3f} +- {stderr:.3f} nats  ({len(log_p)} rows)")
    total = time.perf_counter() - start
    print(f"fit {fitted:.1f} s, with scores {total:.1f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
