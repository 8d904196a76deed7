"""A training killed by SIGKILL at random moments ends with the bytes of one that was not.

    python benchmarks/kills.py --kills 200
    python benchmarks/kills.py --kills 20 --engine compiled

Each process is a fork of this one, so that no kill is spent on imports. It writes a checkpoint
every 10 steps. Every other kill comes at a random time, wherever the process is then, and the
others after a random step. What is compared are the SHA-256 of the final parameters and the history
without its times; one line of JSON says how old the newest checkpoint was at the kills, in steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pvae
from pvae import loop
from pvae.checkpoints import newest, steps
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE


def train(folder: Path, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood="gaussian")
    guide = Gaussian(6, model.latents, hidden=(8,))
    x = torch.randn(110, 6, generator=torch.Generator().manual_seed(1))
    epochs = arguments.steps // 10  # of 10 batches: the last of each is half as large
    pvae.fit(
        model, guide, x[:105], valid=x[105:], epochs=epochs, batch_size=11, lr=1e-2,
        lr_schedule="cosine", engine=arguments.engine, alternate=arguments.alternate,
        run_dir=folder, resume=True, checkpoint_every=f"{arguments.every} steps", progress=False,
    )  # fmt: skip


def start(
    folder: Path, arguments: argparse.Namespace, shared: mmap.mmap, last: int | None = None
) -> int:
    """Fork a process that trains and writes its step into the shared memory; ``last`` kills it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        heed: Callable[[Any], None] = loop.Loop._heed

        def told(each: Any) -> None:
            shared[:8] = struct.pack("q", each.place.step)
            if each.place.step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            heed(each)

        loop.Loop._heed = told  # type: ignore[method-assign]
        train(folder, arguments)
        code = 0
    finally:
        os._exit(code)


def outcome(folder: Path) -> tuple[str, list[dict[str, float]]]:
    content = (folder / "checkpoints/best/tensors.safetensors").read_bytes()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return hashlib.sha256(content).hexdigest(), kept


def engine_used(folder: Path) -> str:
    found = newest(folder / "checkpoints")
    assert found is not None
    return str(found[1][1]["place"]["engine"])


def newest_step(folder: Path) -> int:
    found = steps(folder / "checkpoints")
    return int(found[-1].name[5:13]) if found else 0


def killed_run(
    folder: Path, arguments: argparse.Namespace, duration: float, budget: int, shared: mmap.mmap
) -> list[int]:
    """Start and kill until it ends; the age in steps of the newest checkpoint at each kill."""
    ages: list[int] = []
    while True:
        begin, last, ended = newest_step(folder), None, 0
        shared[:8] = struct.pack("q", begin)
        if len(ages) < budget and len(ages) % 2 == 0:
            last = begin + random.randint(1, arguments.steps // 2)
        pid = start(folder, arguments, shared, last)
        if len(ages) < budget and last is None:
            until = time.monotonic() + random.uniform(0, duration / 2)
            while not ended and time.monotonic() < until:
                ended, status = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.001)
            if not ended:
                os.kill(pid, signal.SIGKILL)
        if not ended:
            _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                raise SystemExit("a training failed")
            return ages
        ages.append(struct.unpack("q", shared[:8])[0] - newest_step(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--alternate", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shared = mmap.mmap(-1, 8)
    place = Path(tempfile.mkdtemp(prefix="pvae-kills-"))
    try:
        begun = time.monotonic()
        os.waitpid(start(place / "whole", arguments, shared), 0)
        duration = time.monotonic() - begun
        whole, ages, runs = outcome(place / "whole"), list[int](), 0
        while len(ages) < arguments.kills and time.monotonic() - begun < arguments.seconds:
            folder = place / str(runs)
            ages += killed_run(folder, arguments, duration, arguments.kills - len(ages), shared)
            if outcome(folder) != whole:
                raise SystemExit(f"run {runs}, killed {len(ages)} times so far, ended otherwise")
            print(f"{len(ages)} kills in {runs + 1} runs", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
            runs += 1
        print(json.dumps({
            "engine": engine_used(place / "whole"), "kills": len(ages), "runs": runs,
            "identical": runs, "ages": sorted(set(ages)),
            "seconds": round(time.monotonic() - begun, 1), "sha256": whole[0][:16],
        }))  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
