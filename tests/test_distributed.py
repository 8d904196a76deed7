"""Two processes take the steps of one, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_programs as programs
import numpy as np
import pyro
import pytest
import torch

import pvae
from pvae import distributed
from pvae.cli import main
from pvae.errors import OptionError, ProgramError
from pvae.launchers import Launched, launched

ROOT = Path(__file__).parents[1]


def start(work: str, out: Path, size: int = 2, **variables: str) -> list[subprocess.Popen[str]]:
    """The ranks of one job, on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR",
        **variables,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "distributed_programs.py", work, out],
            env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def ends(ranks: list[subprocess.Popen[str]], timeout: float = 200) -> list[tuple[int, str]]:
    """Exit code and standard error of each rank."""
    try:
        errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


STOPPING = "pvae: stopping after this step; again to leave at once"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same work by two processes, by one in two parts, and what one does in one part."""
    folder = tmp_path_factory.mktemp("group")
    ranks = start("equalities", folder / "two.pt")
    alone = programs.equalities(2, folder / "alone")
    # The one line of a training that is asked to stop.
    told = [(code, error.replace(STOPPING, "").strip()) for code, error in ends(ranks)]
    assert told == [(0, ""), (0, "")]
    unfit = [(folder / f"unfit-{rank}").read_text() for rank in range(2)]
    return {"two": torch.load(folder / "two.pt"), "alone": alone, "unfit": unfit}


PLATES = [f"{objective}, {plate}" for objective in ("elbo", "iwae") for plate in ("len(x)", "N")]


@pytest.mark.parametrize("case", PLATES)
def test_gradients_of_two_processes_are_those_of_one(found, case):
    for name in (f"gradient {case}", f"given gradient {case}"):
        two, alone = found["two"][name], found["alone"][name]
        assert alone.abs().min() > 0
        torch.testing.assert_close(two, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", PLATES)
def test_gradients_of_two_processes_are_those_of_the_whole_batch(found, case):
    """Noise that comes with the data is the same however a batch is cut."""
    objective, plate = case.split(", ")
    whole = programs.gradient(objective, subsample=plate == "N", given=True)
    torch.testing.assert_close(found["two"][f"given gradient {case}"], whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_a_training_on_two_processes_ends_where_one_does(found, objective):
    """100 steps, the last of each epoch on two rows: one for each process."""
    for name in (f"trained {objective}", f"given trained {objective}"):
        torch.testing.assert_close(found["two"][name], found["alone"][name], rtol=1e-5, atol=1e-8)
    whole = programs.train(objective, subsample=False, given=True)
    name = f"given trained {objective}"
    torch.testing.assert_close(found["two"][name], whole, rtol=1e-5, atol=1e-8)
    drawn = programs.train(objective, subsample=True)  # one part has noise of its own
    assert (found["two"][f"trained {objective}"] - drawn).abs().max() > 1e-3


def test_a_last_batch_of_one_row_leaves_a_rank_without_any(found):
    whole = programs.train("iwae", subsample=False, given=True, rows=49, epochs=3)
    torch.testing.assert_close(found["two"]["one row left"], whole, rtol=1e-6, atol=1e-9)


def test_a_rank_may_work_by_itself(found):
    whole = programs.train("elbo", subsample=False, epochs=1)
    assert torch.equal(found["two"]["whole"], whole)


def test_a_staged_step_in_parts_is_the_eager_one(found):
    eager = programs.train("iwae", subsample=False, parts=2)
    for where in ("two", "alone"):
        torch.testing.assert_close(found[where]["staged"], eager, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_in_a_group_is_the_eager_one(tmp_path):
    assert [code for code, _ in ends(start("compiled", tmp_path / "two.pt"))] == [0, 0]
    eager = programs.train("iwae", subsample=False, parts=2, epochs=3)
    found = torch.load(tmp_path / "two.pt")["compiled"]
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-8)


def test_all_ranks_roll_back_together(found):
    """Two processes end where one in two parts does, and not where one does that never had to."""
    two, alone = found["two"]["rolled back"], found["alone"]["rolled back"]
    torch.testing.assert_close(two, alone, rtol=1e-5, atol=1e-8)
    assert bool(torch.isfinite(two).all())
    plain = programs.train("elbo", subsample=False, parts=2, epochs=12)
    assert (two[:-1] - plain[:-1]).abs().max() > 1e-3


def test_a_training_resumes_in_a_group(found):
    for where in ("two", "alone"):
        assert torch.equal(found[where]["resumed"], found[where]["valid"])
    torch.testing.assert_close(found["two"]["valid"], found["alone"]["valid"])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(found):
    for where in ("two", "alone"):
        assert torch.equal(found[where]["interrupted"], found[where]["valid"])


def test_evidence_of_two_processes_is_that_of_one(found):
    for name in ("evidence", "k-hat", "ess"):
        assert len(found["two"][name]) == 1000
        assert torch.equal(found["two"][name], found["alone"][name])
    one = programs.evidence(1)["evidence"]
    assert not torch.equal(one, found["two"]["evidence"])
    assert abs(float((one - found["two"]["evidence"]).mean())) < 0.1


@pytest.mark.parametrize("parts", [3, 7])
def test_more_parts_than_processes_accumulate(parts):
    """Parts of 6, 6 and 4 rows, and of two rows and none, weigh by their rows."""
    whole = programs.train("iwae", subsample=True, given=True, epochs=4)
    cut = programs.train("iwae", subsample=True, given=True, epochs=4, parts=parts)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-9)


def test_parts_that_all_weigh_alike_are_caught(monkeypatch):
    whole = programs.gradient("iwae", subsample=True, given=True)
    monkeypatch.setattr("pvae.parts._weight", lambda rows, index: 1 / 3)
    wrong = programs.gradient("iwae", subsample=True, given=True, parts=3)
    assert (wrong - whole).abs().max() > 1e-4


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_with_its_number(tmp_path, victim):
    ranks = start("killed", tmp_path / "none.pt", VICTIM=str(victim))
    assert ranks[victim].wait(timeout=120) == -9
    killed = time.monotonic()
    code, error = ends(ranks)[1 - victim]
    assert time.monotonic() - killed < 30
    assert code == 75
    (line,) = error.splitlines()
    assert line.startswith(f"LostRankError: rank {victim} of 2 was lost")


def test_all_ranks_say_what_one_rank_found(found):
    first, second = found["unfit"]
    assert first == second
    assert first.startswith("epoch 2, step 1: model site 'z' has a log density")
    assert "data rows 3)" in first


def test_torchrun_trains_one_run_and_one_rank_speaks(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 3)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "pvae", "train", "factor_analysis", "--data", tmp_path / "x.npy", "--epochs", "2",
        "--run-dir", tmp_path / "run", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert job.returncode == 0, job.stderr[-3000:]
    assert job.stdout.count("best epoch") == 1
    assert job.stderr.count("epoch 2/2") == 1
    run = pvae.load(tmp_path / "run")
    assert [row["epoch"] for row in run.history] == [1, 2]


def test_a_rank_stops_counting_before_its_process_ends(monkeypatch):
    """A thread within the store's C++ while Python ends would abort it."""
    at_exit = []
    monkeypatch.setattr(distributed, "_own_connection", torch.distributed.HashStore)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    pulse = distributed._Pulse(0, 1, "test")
    assert pulse.thread.is_alive()
    for function in at_exit:
        function()
    assert not pulse.thread.is_alive()


def test_two_processes_compare_runs_and_one_writes(tmp_path):
    """The board of two processes is that of one in two parts; the exact row that of any."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 3)))
    for name, model in (("one", "factor_analysis"), ("two", "vae")):
        words = ["train", model, "--data", tmp_path / "x.npy", "--epochs", "2", "--device", "cpu"]
        assert main([*map(str, words), "--engine", "eager", "--run-dir", str(tmp_path / name)]) == 0
    given = [str(tmp_path / name) for name in ("one", "two")]
    options = ["--num-particles", "50", "--run-dir"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "pvae", "compare", *given, *options, str(tmp_path / "shared"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("mean log p ±") == 1
    assert job.stdout.count("wrote ") == 1
    assert main(["compare", *given, *options, str(tmp_path / "alone")]) == 0
    shared, alone = (
        {row["name"]: row for row in json.loads((tmp_path / n / "board.json").read_text())["rows"]}
        for n in ("shared", "alone")
    )
    assert shared["one"]["mean"] == pytest.approx(alone["one"]["mean"], rel=1e-6)
    run = pvae.load(tmp_path / "two")
    split = pvae.data.load(tmp_path / "x.npy").test
    found = pvae.evidence.in_parts(run.model, run.guide, split.x, 50, parts=2)
    mean = found.shifted(split.log_det).mean
    assert shared["two"]["mean"] == pytest.approx(mean, rel=1e-9)
    assert shared["two"]["mean"] != alone["two"]["mean"]


def test_the_roster_is_refused_to_several(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    group = type("Group", (), {"rank": 0, "size": 2})()
    monkeypatch.setattr("pvae.commands.compare.grouped", lambda _: contextlib.nullcontext(group))
    assert main(["compare", "--data", "digits"]) == 2
    assert "name the runs to compare" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_commands_for_one_process_are_refused_to_several(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **MASTER}.items():
        monkeypatch.setenv(name, value)
    assert main(["list"]) == 2
    assert "pvae list is the work of one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": 0}, "parts must be between the number of processes"),
        ({"parts": 17, "batch_size": 16}, "got 17"),
        ({"parts": 2, "engine": "cudagraph"}, "engine='compiled'"),
        ({"parts": 2, "objective": pvae.vae(penalty=pvae.penalties.mmd(10))}, "one part"),
        ({"parts": 2, "objective": pyro.infer.Trace_ELBO()}, "pvae.vae()"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, words):
    pair = programs.Pair(subsample=False)
    with pytest.raises(OptionError, match=re.escape(words)):
        pvae.fit(pair.model, pair.guide, programs.data(), progress=False, device="cpu", **options)


def test_batch_normalisation_is_refused_in_parts():
    pair = programs.Pair(subsample=False)
    pair.encode = torch.nn.Sequential(pair.encode, torch.nn.BatchNorm1d(4)).double()
    model, guide = WithModule(pair, pair.model), WithModule(pair, pair.guide)
    with pytest.raises(ProgramError, match="layer or group normalisation"):
        pvae.fit(model, guide, programs.data(), parts=2, progress=False, device="cpu")


class WithModule(torch.nn.Module):
    """A program as a module that owns its networks."""

    def __init__(self, pair, program):
        super().__init__()
        self.pair, self.program = pair, program

    def forward(self, x):
        self.program(x)


# --- launchers -----------------------------------------------------------------------------------

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_of_each_launcher():
    assert launched({}) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    place = launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER})
    assert place == Launched(3, 4, 1, "127.0.0.1", 29500)
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    assert launched(step | MASTER) == Launched(1, 2, 1, "127.0.0.1", 29500)
    # sbatch's own script is one process, however many tasks it may start
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **MASTER}) is None
    with pytest.warns(UserWarning, match="works alone"):
        assert launched(step) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two", **MASTER}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "expected 0 to 1"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused(given, words):
    with pytest.raises(OptionError, match=words):
        launched(given)
