"""What two processes and one compute alike; run as a script, it is one rank of several.

``python tests/distributed_programs.py WORK OUT`` with ``RANK``, ``WORLD_SIZE``, … set runs the
function ``WORK`` and writes what it returns to ``OUT`` from rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvae

N, X_DIM, Z_DIM, K = 50, 4, 2, 3


class Given(dist.Normal):  # type: ignore[misc]
    """A normal whose draws use noise ``(B, K * Z_DIM)`` that came with the data."""

    noise: Tensor

    def expand(self, batch_shape: Any, _instance: Any = None) -> Given:
        """Wider by a dimension of particles, with the same noise."""
        wide = Given(self.loc.expand(batch_shape), self.scale.expand(batch_shape))
        wide.noise = self.noise
        return wide

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """``loc + scale * noise``."""
        shape = self._extended_shape(sample_shape)
        eps = self.noise.reshape(shape[-2], -1, Z_DIM).transpose(0, 1)
        return self.loc + self.scale * eps[: shape[0] if len(shape) > 2 else 1].reshape(shape)


class Pair(nn.Module):
    """A linear model and guide with parameters of their own."""

    def __init__(self, *, subsample: bool, given: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.decode, self.encode = nn.Linear(Z_DIM, X_DIM), nn.Linear(X_DIM, 2 * Z_DIM)
        self.subsample, self.given = subsample, given
        self.double()

    def plate(self, x: Tensor) -> Any:
        """As users write it: over the batch, or over all data of which these are some."""
        if self.subsample:
            return pyro.plate("data", N, subsample=x)
        return pyro.plate("data", len(x))

    def model(self, x: Tensor) -> None:
        """``x ~ Normal(W z + b, 1)``."""
        zero = torch.zeros(len(x), Z_DIM, dtype=x.dtype)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x[:, :X_DIM])

    def guide(self, x: Tensor) -> None:
        """Diagonal."""
        loc, log_scale = self.encode(x[:, :X_DIM]).chunk(2, -1)
        with self.plate(x):
            q = Given(loc, log_scale.exp()) if self.given else dist.Normal(loc, log_scale.exp())
            if self.given:
                q.noise = x[:, X_DIM:]
            pyro.sample("z", q.to_event(1))

    def vector(self) -> Tensor:
        """All parameters."""
        return nn.utils.parameters_to_vector(self.parameters()).detach()


def data() -> Tensor:
    """``(N, X_DIM + K Z_DIM)``: data, then noise."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(N, X_DIM + K * Z_DIM, dtype=torch.float64, generator=generator)


OBJECTIVES = {"elbo": pvae.vae, "iwae": lambda: pvae.iwae(K)}


def train(
    objective: str,
    *,
    subsample: bool,
    given: bool = False,
    epochs: int = 25,
    rows: int = N,
    **options: Any,
) -> Tensor:
    """Parameters after 25 epochs of batches of 16, 16, 16 and 2."""
    pair = Pair(subsample=subsample, given=given)
    settings: dict[str, Any] = {"batch_size": 16, "lr": 0.01, "engine": "eager", "clip_norm": 5.0}
    run = pvae.fit(
        pair.model, pair.guide, data()[:rows], objective=OBJECTIVES[objective](), progress=False,
        epochs=epochs, device="cpu", **{**settings, **options},
    )  # fmt: skip
    assert len(run.history) == epochs
    return torch.cat([pair.vector(), torch.tensor([run.history[-1]["bound"]])])


def gradient(objective: str, *, subsample: bool, given: bool = False, **options: Any) -> Tensor:
    """Of all data but one as a batch, by a step of length one."""
    before = Pair(subsample=subsample).vector()
    after = train(
        objective, subsample=subsample, given=given, epochs=1, batch_size=N, optimizer="sgd",
        lr=1.0, clip_norm=None, **options,
    )  # fmt: skip
    return before - after[:-1]


def equalities(parts: int | None, folder: Path) -> dict[str, Tensor]:
    """Everything that any number of processes has to compute alike."""
    found = {}
    for objective in OBJECTIVES:
        for subsample in (False, True):
            name = f"{objective}, {'N' if subsample else 'len(x)'}"
            found[f"gradient {name}"] = gradient(objective, subsample=subsample, parts=parts)
            found[f"given gradient {name}"] = gradient(
                objective, subsample=subsample, given=True, parts=parts
            )
        found[f"trained {objective}"] = train(objective, subsample=True, parts=parts)
        found[f"given trained {objective}"] = train(
            objective, subsample=False, given=True, parts=parts
        )
    found["one row left"] = train(
        "iwae", subsample=False, given=True, rows=49, parts=parts, epochs=3
    )
    found["staged"] = train("iwae", subsample=False, parts=parts, engine="staged")
    x = data()
    found["valid"] = train(
        "elbo", subsample=False, parts=parts, epochs=4, valid=x[:33], patience=3,
        run_dir=folder / "whole", checkpoint_every="5 steps",
    )  # fmt: skip
    for epochs in (2, 4):
        found["resumed"] = train(
            "elbo", subsample=False, parts=parts, epochs=epochs, valid=x[:33], patience=3,
            run_dir=folder / "halves", checkpoint_every="5 steps", resume=epochs == 4,
        )  # fmt: skip
    found["rolled back"] = rolled_back(parts)
    found["interrupted"] = interrupted(parts, folder / "interrupted")
    return found | evidence(parts)


def rolled_back(parts: int | None) -> Tensor:
    """A training that is rolled back now and then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train("elbo", subsample=False, parts=parts, epochs=12, on_nan="rollback",
                     preprocess=_sometimes_too_large)  # fmt: skip


def _sometimes_too_large(x: Tensor) -> Tensor:
    """By the noise of the part, which is the same on every number of processes."""
    return torch.where(torch.rand(()) < 0.04, 1e200, x)


def interrupted(parts: int | None, folder: Path) -> Tensor:
    """The training called ``valid``, of which one rank is told to stop at its seventh batch."""
    options: dict[str, Any] = {
        "subsample": False, "parts": parts, "epochs": 4, "valid": data()[:33], "patience": 3,
        "run_dir": folder, "checkpoint_every": "1 epoch",
    }  # fmt: skip
    batches = iter(range(10**6))

    def preprocess(x: Tensor) -> Tensor:
        if next(batches) == 7 and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    try:
        train("elbo", preprocess=preprocess, **options)
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:
            raise
        return train("elbo", resume=True, **options)
    raise AssertionError("it was not interrupted")


def evidence(parts: int | None) -> dict[str, Tensor]:
    """Of 1,000 points."""
    pair = Pair(subsample=False)
    x = torch.randn(1000, X_DIM, generator=torch.Generator().manual_seed(2)).double()
    found = pvae.evidence.in_parts(pair.model, pair.guide, x, 20, parts=parts)
    return {"evidence": found.log_evidence, "k-hat": found.pareto_k, "ess": found.ess}


def _equalities(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = equalities(None, out.parent / "group")
    with pvae.distributed.alone():
        found["whole"] = train("elbo", subsample=False, epochs=1)
    try:
        _unfit()
    except pvae.PvaeError as error:
        (out.parent / f"unfit-{os.environ['RANK']}").write_text(str(error))
    return found


def _compiled(out: Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"subsample": False, "epochs": 3, "engine": "compiled"}
    return {"compiled": train("iwae", **options)}


def _killed(out: Path) -> dict[str, Tensor]:
    steps = iter(range(10**6))

    def preprocess(x: Tensor) -> Tensor:
        if next(steps) == 30 and os.environ["RANK"] == os.environ["VICTIM"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    return {"none": train("elbo", subsample=False, epochs=10**5, preprocess=preprocess)}


def _unfit() -> None:
    """From the third step on one datum is too large, which one rank alone sees."""
    pair, steps = Pair(subsample=False), iter(range(10**6))
    x = data()
    x[3, 0] = 7.0

    def preprocess(x: Tensor) -> Tensor:
        return torch.where(x == 7.0, 1e200, x) if next(steps) > 2 else x

    pvae.fit(
        pair.model, pair.guide, x, batch_size=N, epochs=9, engine="eager", progress=False,
        device="cpu", preprocess=preprocess,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    work, target = sys.argv[1], Path(sys.argv[2])
    try:
        results = globals()[f"_{work}"](target)
    except pvae.PvaeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        sys.exit(error.exit_code)
    if os.environ["RANK"] == "0":
        torch.save(results, target)
