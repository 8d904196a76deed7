"""Sweeps: no trial is lost or doubled, whatever is killed; wrong options are one sentence."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pvae import runs, sweeps
from pvae.cli import main
from pvae.errors import NonFiniteError, OptionError, RunError

optuna = pytest.importorskip("optuna")
CONFIG = {**runs.DEFAULTS, "model": "vae", "epochs": 10}
SEARCH = ["lr=log:1e-4..1e-1", "model.z_dim=2..32", "both.activation=silu|tanh"]


def bowl(config, report):
    """Best at lr = 1e-2; reports a rising curve."""
    value = -((math.log10(config["lr"]) + 2) ** 2)
    for epoch in range(1, config["epochs"] + 1):
        report(value - 1 / epoch, epoch)
    return value, {"num_parameters": 3}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "sweep"
    sweeps.begin(place, CONFIG, SEARCH)
    return place


def run(folder, trials, train=bowl, worker=0):
    sweeps.work(folder, storage=None, trials=trials, worker=worker, train=train)
    return sweeps.open_study(folder, None)


def test_the_best_is_found_and_written(folder):
    study = run(folder, 25)
    sweeps.write_results(folder, study)
    assert sweeps.finished(study) == 25
    best = runs.read_yaml(folder / "best.yaml")
    assert 3e-3 < best["lr"] < 3e-2
    assert best["model_options"]["z_dim"] == study.best_trial.params["model.z_dim"]
    assert best["guide_options"]["activation"] == study.best_trial.params["both.activation"]
    table = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in table] == list(range(25))
    assert {row["state"] for row in table} == {"complete", "pruned"}
    assert max(sweeps.importances(study), key=sweeps.importances(study).get) == "lr"
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert {"history.png", "importances.png", "parallel_coordinates.png"} <= pictures
    assert "25 trials" not in sweeps.summary(folder, study)
    assert "completed" in sweeps.summary(folder, study)


def test_a_sweep_that_goes_on_has_each_trial_once(folder):
    class Killed(BaseException):
        pass

    def killed_in_the_fourth(config, report):
        if len(taken) == 3:
            raise Killed
        taken.append(config["lr"])
        return bowl(config, report)

    taken: list[float] = []
    with pytest.raises(Killed):
        run(folder, 12, killed_in_the_fourth)
    study = sweeps.open_study(folder, None)
    assert sweeps.finished(study) == 3
    left = [t.params for t in study.trials if t.state.name == "RUNNING"]
    assert sweeps.reclaim(folder, study) == len(left) == 1
    study = run(folder, 12)
    assert sweeps.finished(study) == 12
    again = [t for t in study.trials if "again" in t.user_attrs]
    assert [t.params for t in again] == left
    outcomes = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len({t.params["lr"] for t in outcomes}) == 12, "a resumed worker proposes anew"


def test_workers_side_by_side_never_overshoot(folder):
    def slow(config, report):
        time.sleep(0.05)
        return bowl(config, report)

    threads = [
        threading.Thread(target=run, args=(folder, 9, slow), kwargs={"worker": k}) for k in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    study = sweeps.open_study(folder, None)
    assert len(study.trials) == sweeps.finished(study) == 9


def test_a_torn_journal_is_repaired_and_loses_nothing_else(folder):
    run(folder, 4)
    journal = folder / "journal.log"
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "ab')
    assert sweeps.repair(folder) == 31
    assert journal.read_bytes() == whole
    (torn,) = folder.glob("journal.log.torn-*")
    assert torn.read_bytes().startswith(b'{"op_code"')
    assert sweeps.repair(folder) == 0
    assert sweeps.finished(run(folder, 6)) == 6


def test_trials_that_fail_are_counted_and_say_why(folder):
    def fails(config, report):
        if config["model_options"]["z_dim"] > 16:
            raise OptionError("z_dim is too large")
        raise NonFiniteError("epoch 1: the bound is not finite")

    study = run(folder, 6, fails)
    assert sweeps.finished(study) == 6
    reasons = {row["reason"] for row in sweeps.rows(study)}
    assert reasons <= {"z_dim is too large", "epoch 1: the bound is not finite"}
    with pytest.raises(RunError, match="no trial was completed"):
        sweeps.write_results(folder, study)


def test_a_value_that_is_no_number_costs_one_trial(folder):
    values = iter([math.nan] * 3)

    def gives_none(config, report):
        value = next(values, None)
        return (-1.0 if value is None else value), {}

    study = run(folder, 4, gives_none)
    assert sweeps.finished(study) == len(study.trials) == 4
    assert [row["reason"] for row in sweeps.rows(study)][2] == "its log evidence is not a number"


def test_an_error_that_nobody_foresaw_costs_one_trial(folder):
    def runs_out_of_memory_once(config, report):
        if not taken:
            taken.append(config)
            raise RuntimeError("out of\nmemory")
        return bowl(config, report)

    taken: list[dict] = []
    study = run(folder, 4, runs_out_of_memory_once)
    assert sweeps.finished(study) == len(study.trials) == 4
    assert [row["reason"] for row in sweeps.rows(study)][0] == "RuntimeError: out of memory"
    assert study.best_value < 0


def test_another_sweep_in_the_folder_is_refused_with_the_difference(folder, tmp_path):
    with pytest.raises(RunError, match="epochs = 10, not 11"):
        sweeps.begin(folder, {**CONFIG, "epochs": 11}, SEARCH)
    with pytest.raises(RunError, match="search = "):
        sweeps.begin(folder, CONFIG, SEARCH[:1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds no sweep"):
        sweeps.begin(tmp_path / "other", CONFIG, SEARCH)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs something to vary"),
        (["--search", "z_dim=2..4"], "model.z_dim"),
        (["--search", "model.zdim=2..4"], "z_dim"),
        (["--search", "optimizer=adam|adm", "--trials", "0"], "--trials must be at least 1"),
        (["--search", "model.activation=silu|3", "--confirm", "-1"], "--confirm takes"),
        (["--search", "guide=gaussian|gausian"], "gaussian"),
        (["--search", "objective.alpha=1..4"], "no option"),
        (["--search", "lr=0.1..0.2", "--resume", "out"], "leave --resume out"),
        (["--search", "lr=0.1..0.2", "--storage", "nonsense://x"], "cannot be used"),
    ],
)
def test_wrong_words_are_one_line_and_write_nothing(words, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "vae", "--data", "digits", "--run-dir", "out", *words]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pvae: error: ")
    assert message in error
    assert not (tmp_path / "out" / "journal.log").exists()


def test_killed_in_the_middle_and_continued_by_two_workers(tmp_path):
    """The whole command: SIGKILL, the same command again, every trial once, a confirmed best."""
    out = tmp_path / "sweep"
    command = [
        sys.executable, "-m", "pvae", "sweep", "vae", "--data", "digits", "--epochs", "3",
        "--search", "lr=log:1e-3..1e-2", "--search", "model.z_dim=2..8", "--trials", "5",
        "--jobs", "2", "--confirm", "2", "--model.hidden", "[16]", "--guide.hidden", "[16]",
        "--run-dir", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if (out / "journal.log").exists() and b'"op_code":6' in (
            (out / "journal.log").read_bytes().replace(b" ", b"")
        ):
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert second.returncode == 0, second.stderr
    assert "going on" in second.stdout
    study = sweeps.open_study(out, None)
    outcomes = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(outcomes) == sweeps.finished(study) == 5
    assert len({t.params["lr"] for t in outcomes}) == 5
    confirmed = json.loads((out / "confirmed.json").read_text())
    assert [result["seed"] for result in confirmed["seeds"]] == [1, 2]
    assert confirmed["stderr_over_seeds"] > 0
    again = subprocess.run(
        [sys.executable, "-m", "pvae", "train", "--config", str(out / "best.yaml"),
         "--run-dir", str(tmp_path / "best"), "--epochs", "1"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


def shared_sweep(out: Path, trials: int = 6) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "pvae", "sweep", "vae", "--data", "digits", "--epochs", "3",
        "--search", "lr=log:1e-3..1e-2", "--trials", str(trials), "--jobs", "1", "--confirm", "1",
        "--model.hidden", "[16]", "--guide.hidden", "[16]", "--run-dir", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_two_commands_on_one_folder_share_the_trials(tmp_path):
    """One leads, writes and confirms; none of the trials is lost or doubled."""
    out = tmp_path / "sweep"
    commands = [shared_sweep(out) for _ in range(2)]
    said = [command.communicate(timeout=300) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    assert sum("another command leads" in output for output, _ in said) == 1
    assert sum("best configuration, test" in output for output, _ in said) == 1
    study = sweeps.open_study(out, None)
    assert sweeps.finished(study) == len(study.trials) == 6
    assert len({t.params["lr"] for t in study.trials}) == 6
    owners = {t.user_attrs["owner"] for t in study.trials}
    assert len(owners) == 2, "both have work"
    assert sweeps.is_written(out, study, confirmed=True)
    assert not sweeps.others_work(out)


def test_a_helper_goes_on_alone_when_the_leader_is_killed(tmp_path):
    out = tmp_path / "sweep"
    leader = shared_sweep(out, 16)
    until = time.monotonic() + 120
    while not list(out.glob(".workers/*")) and time.monotonic() < until:
        time.sleep(0.05)
    helper = shared_sweep(out, 16)
    while len(list(out.glob(".workers/*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert leader.poll() is None, "it was too quick for this test"
    leader.kill()
    leader.communicate()
    output, errors = helper.communicate(timeout=300)
    assert helper.returncode == 0, errors
    assert "another command leads" in output
    assert "best configuration, test" in output
    study = sweeps.open_study(out, None)
    assert sweeps.finished(study) == 16
    states = [t.state.name for t in study.trials]
    assert states.count("RUNNING") == 0
