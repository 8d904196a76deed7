"""The public boards: cells by their hash, resuming, failures, intervals, tables, wrong inputs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pvae
from pvae import board, cells, locks, runs, standings, workers
from pvae.cells import Result
from pvae.cli import main
from pvae.errors import OptionError, RunError
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.published import footnotes, published
from pvae.seeds import mix
from pvae.segments import _resume, fit_in_segments

ROOT = Path(__file__).parents[1]
SIGMAS = 4.5
SMALL = {"steps": 13, "epochs": 1, "batch_size": 100, "lr": 1e-3, "engine": "eager",
         "num_particles": 5}  # fmt: skip


def cell(data: str, entry: str, **options) -> board.Cell:
    kind = "continuous" if options.pop("continuous", False) else "binary"
    (found,) = board.cells(kind, schedule="smoke", data=[data], entries=[entry], **options)
    return found


def network(**training) -> dict:
    """The configuration of a tiny VAE on digits."""
    config = dict(cell("digits", "vae-elbo").config)
    return {**config, "training": {**SMALL, **training}}


def run_command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pvae", *words],
        capture_output=True, text=True, env=surroundings() | environment, check=False,
    )  # fmt: skip


def surroundings() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# --- what a board holds --------------------------------------------------------------------------


def test_a_cell_is_known_by_its_configuration():
    first, again = cell("nltcs", "vae-elbo"), cell("nltcs", "vae-elbo")
    assert first.digest == again.digest
    reordered = dataclasses.replace(first, config=dict(reversed(list(first.config.items()))))
    assert reordered.digest == first.digest
    others = [
        cell("plants", "vae-elbo"),
        cell("nltcs", "vae-dreg-5"),
        *board.cells("binary", schedule="quick", data=["nltcs"], entries=["vae-elbo"]),
        board.cells("binary", schedule="smoke", data=["nltcs"], entries=["vae-elbo"], seeds=2)[1],
    ]
    digests = {each.digest for each in [first, *others]}
    assert len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("schedule", board.SCHEDULES)
@pytest.mark.parametrize("name", board.BOARDS)
def test_every_cell_is_plain_and_its_own(name, schedule):
    found = board.cells(name, schedule=schedule, seeds=2)
    assert len({each.digest for each in found}) == len(found)
    for each in found:
        assert json.loads(json.dumps(each.config)) == each.config
        assert each.task.data in pvae.data.sources()
        if "baseline" in each.config:
            assert each.config["baseline"] in pvae.baselines.available()
    assert {each.task.data for each in found} == {task.data for task in board.BOARDS[name]}


def test_a_density_that_is_not_there_is_left_out(monkeypatch):
    from pvae import baselines

    everything = [*baselines.available(), "student-t-mixture", "mixture-of-factor-analysers"]
    monkeypatch.setattr(baselines, "available", lambda: dict.fromkeys(everything, ""))
    full = {each.entry for each in board.cells("continuous")}
    assert {"student-t-mixture", "mixture-of-factor-analysers"} <= full
    monkeypatch.setattr(baselines, "available", lambda: {"ppca": ""})
    left = {each.entry for each in board.cells("continuous")}
    assert "ppca" in left
    assert not {"student-t-mixture", "kernel-density"} & left


def test_rates_of_the_reduced_schedule():
    """3^i passes at 10^(-i/7), i = 0 .. 5."""
    edges = [0, 1, 4, 13, 40, 121, 364]
    for stage, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        for passes in (begin, end - 0.002):
            assert board.rate_factor(passes) == pytest.approx(10 ** (-stage / 7), rel=1e-12)
    assert board.SCHEDULES["reduced"]["passes"] == edges[-1]
    (long,) = board.cells(
        "binary", schedule="reduced", data=["mnist-static"], entries=["vae-iwae-50"]
    )
    assert long.config["objective_options"] == {"num_particles": 50}
    assert long.config["model_options"] == {"z_dim": 50, "hidden": [200, 200], "activation": "tanh"}
    assert long.config["training"] == {
        "passes": 364, "segment": 7, "batch_size": 100, "lr": 1e-3, "eps": 1e-4,
        "engine": "compiled", "num_particles": 5000, "valid_particles": 500,
    }  # fmt: skip


def test_a_precision_is_a_cell_of_its_own():
    """It changes the configuration of VAEs alone, and nothing where it is full."""
    full, rounded = cell("digits", "vae-elbo"), cell("digits", "vae-elbo", precision="bfloat16")
    assert cell("digits", "vae-elbo", precision="full") == full
    assert rounded.title == "VAE, ELBO, bfloat16"
    assert rounded.digest != full.digest
    assert rounded.config["training"] == {**full.config["training"], "precision": "bfloat16"}
    density = cell("digits", "bernoulli-mixture", precision="bfloat16")
    assert density == cell("digits", "bernoulli-mixture")
    with pytest.raises(OptionError, match="no precision is called 'half'"):
        cell("digits", "vae-elbo", precision="half")


@pytest.mark.parametrize("passes", [{}, {"passes": 1, "segment": 1, "eps": 1e-8}])
def test_a_cell_trains_in_its_precision(tmp_path, passes):
    found = {}
    for precision in ("full", "bfloat16"):
        folder = tmp_path / precision
        cells.compute(network(precision=precision, **passes), folder)
        assert runs.read_config(folder / "run")["precision"] == precision
        found[precision] = cells.read(folder).log_p
    gap = (found["full"] - found["bfloat16"]).abs()
    assert 0 < float(gap.max()) < 0.5


def test_steps_become_passes():
    assert board.num_epochs({"batch_size": 100, "steps": 6000, "epochs": 150}, 50_000) == 12
    assert board.num_epochs({"batch_size": 100, "steps": 6000, "epochs": 150}, 1257) == 150
    assert board.num_epochs({"batch_size": 100, "steps": 20, "epochs": 3}, 50_000) == 1


def test_board_alone_says_what_it_holds(capsys):
    assert main(["board"]) == 0
    page = capsys.readouterr().out
    for word in ("binary: digits, mnist-static", "bernoulli-mixture", "reduced", "cells a seed"):
        assert word in page


# --- intervals -----------------------------------------------------------------------------------


def test_bootstrap_interval_of_normal_differences():
    """Its ends are mean ± 1.96 s / sqrt(N), up to the error of a quantile of the resamples."""
    torch.manual_seed(0)
    values = 0.3 + torch.randn(3000, 2, dtype=torch.float64)
    low, high = standings.paired_bootstrap(values)
    stderr = values.std(0, correction=0) / math.sqrt(3000)
    noise = math.sqrt(0.025 * 0.975 / 10_000) / 0.0584  # of a 2.5 % quantile, in standard errors
    for end, sign in ((low, -1), (high, 1)):
        z = (end - values.mean(0)) / stderr
        assert (z - sign * 1.95996).abs().max() < SIGMAS * noise
    assert torch.equal(standings.paired_bootstrap(values)[0], low)
    assert not torch.equal(standings.paired_bootstrap(values, seed=1)[0], low)


def test_bootstrap_interval_covers_at_its_level():
    """Of 2000 independent columns; the percentile interval of 200 normal data covers 94.6 %."""
    torch.manual_seed(1)
    low, high = standings.paired_bootstrap(torch.randn(200, 2000), resamples=2000)
    covered = ((low < 0) & (high > 0)).double().mean()
    assert abs(float(covered) - 0.946) < SIGMAS * math.sqrt(0.946 * 0.054 / 2000)


def test_bootstrap_in_blocks_is_the_bootstrap_at_once(monkeypatch):
    values = torch.randn(40, 3, dtype=torch.float64)
    whole = standings.paired_bootstrap(values, resamples=1000)
    monkeypatch.setattr(standings, "_BLOCK_ENTRIES", 41)
    again = standings.paired_bootstrap(values, resamples=1000)
    assert (again - whole).abs().max() < 1e-12


def test_a_column_that_is_not_finite_has_no_interval():
    values = torch.randn(30, 2)
    values[4, 1] = -math.inf
    ends = standings.paired_bootstrap(values, resamples=200)
    assert ends[:, 0].isfinite().all()
    assert ends[:, 1].isnan().all()


# --- tables --------------------------------------------------------------------------------------


def result(log_p: torch.Tensor, **options) -> Result:
    known = {"kind": "exact", "valid_mean": -1.0, "unreliable": None, "num_parameters": 1234,
             "seconds": 2.0, "chosen": "K 5", "num_particles": None, "fingerprint": "f",
             "x_dim": 3}  # fmt: skip
    return Result(log_p=log_p, **{**known, **options})


def table_of_mnist() -> list[standings.Standing]:
    names = ["independent-bits", "bernoulli-mixture", "vae-elbo"]
    chosen = board.cells("binary", schedule="smoke", data=["mnist-static"], entries=names, seeds=2)
    base = -90 + torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outcomes = {
        "independent-bits": [base - 100, base - 102],
        "bernoulli-mixture": [base, base],
    }
    found = []
    for each in chosen:
        rows = outcomes.get(each.entry)
        found.append("no | luck" if rows is None else result(rows[each.config["seed"]]))
    return standings.standings(chosen, found)


def test_a_table_sorts_pairs_and_reports():
    (table,) = table_of_mnist()
    ours = {line.entry: line for line in table.lines if line.status == "ours"}
    best, other = ours["bernoulli-mixture"], ours["independent-bits"]
    assert (best.difference, best.low, best.high) == (0, 0, 0)
    assert other.difference == pytest.approx(-101, abs=1e-9)
    assert other.low == pytest.approx(-101, abs=1e-9)  # paired: constant differences
    assert other.high == pytest.approx(-101, abs=1e-9)
    assert other.seeds == 2
    assert other.seed_std == pytest.approx(math.sqrt(2), abs=1e-9)
    assert other.stderr == pytest.approx(best.stderr, abs=1e-9)
    means = [line.mean for line in table.lines if line.status != "failed"]
    assert means == sorted(means, reverse=True)
    (broken,) = [line for line in table.lines if line.status == "failed"]
    assert table.lines[-1] is broken
    assert (broken.entry, broken.note) == ("vae-elbo", "no | luck")


def test_markdown_and_csv_hold_the_table(tmp_path):
    tables = table_of_mnist()
    text = standings.markdown(tables)
    assert "### mnist-static (500 test data x 3)" in text
    assert "| **Bernoulli mixture** | -90." in text
    assert "| best | exact |" in text
    assert "-101.00 [-101.00, -101.00]" in text
    assert "(2 seeds: 1.41)" in text
    assert "- VAE, ELBO failed: no | luck" in text
    assert "| IWAE-50, 1 layer | -87.10 |  | published [" in text
    for number, source in footnotes(tables[0].published):
        assert f"published [{number}]" in text
        assert f"\n{number}. {source.reference}: {source.protocol}." in text
    rows = list(csv.DictReader(standings.to_csv(tables).splitlines()))
    assert len(rows) == len(tables[0].lines)
    by_status = {status: [r for r in rows if r["status"] == status] for status in
                 ("ours", "published", "failed")}  # fmt: skip
    assert [r["entry"] for r in by_status["ours"]] == ["bernoulli-mixture", "independent-bits"]
    assert all(r["stderr"] == r["entry"] == "" and r["note"] for r in by_status["published"])
    assert len(by_status["published"]) == len(published("mnist-static"))
    assert by_status["failed"][0]["mean"] == ""
    plain = standings.as_text(tables[0])
    assert "**" not in plain
    assert "VAE, ELBO failed: no | luck" in plain


def test_cells_of_different_test_data_are_not_compared():
    chosen = board.cells("binary", schedule="smoke", data=["dna"], entries=["independent-bits"],
                         seeds=2)  # fmt: skip
    x = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(RunError, match="the cells of dna were scored on different test data"):
        standings.standings(chosen, [result(x), result(x, fingerprint="g")])


def test_a_density_of_zero_comes_last():
    names = ["independent-bits", "bernoulli-mixture"]
    chosen = board.cells("binary", schedule="smoke", data=["dna"], entries=names)
    log_p = torch.full((5,), -3.0, dtype=torch.float64)
    never = log_p.clone()
    never[0] = -math.inf
    (table,) = standings.standings(chosen, [result(never), result(log_p)])
    assert [line.entry for line in table.lines] == ["bernoulli-mixture", "independent-bits"]
    assert "-inf ± nan" in standings.markdown([table])


def test_only_numbers_that_were_read_are_published():
    """Static MNIST alone has any; figures that nobody has confirmed are not among them."""
    sets = {task.data for tasks in board.BOARDS.values() for task in tasks}
    assert {data for data in sets if published(data)} == {"mnist-static"}
    shown = {entry.log_p for entry in published("mnist-static")}
    unconfirmed = {-137.64, -168.95, -88.33, -85.10, -86.64, -86.34, -88.56, -86.05, -82.41, -80.58}
    dynamic = {-86.76, -85.54, -84.78, -85.33, -82.90, -84.50, -82.38, -81.24}
    assert not shown & (unconfirmed | dynamic)
    assert {-88.71, -87.63, -87.10, -88.08, -86.17, -85.32, -85.57, -83.19, -86.82} <= shown


def test_picture_of_a_board(tmp_path):
    from pvae import plots

    path = plots.save(plots.standings(table_of_mnist()), tmp_path / "board.png")
    assert path.stat().st_size > 10_000


# --- one cell ------------------------------------------------------------------------------------


def test_a_classical_cell_keeps_the_best_of_validation(tmp_path):
    config = dict(cell("digits", "bernoulli-mixture").config)
    tried = [{"n_components": 1}, {"n_components": 4}, {"n_components": 10**6}]
    with pytest.warns(UserWarning, match="K 1000000 was left out"):
        cells.compute({**config, "candidates": tried}, tmp_path / "c")
    found = cells.read(tmp_path / "c")
    data = pvae.data.load("digits", binarize="fixed")
    direct = pvae.baselines.BernoulliMixture(4, seed=0).fit(data.train.x)
    assert found.chosen == "K 4"
    assert torch.equal(found.log_p, direct.score_samples(data.test.x))
    assert found.valid_mean == pytest.approx(float(direct.score_samples(data.valid.x).mean()))
    assert (found.kind, found.unreliable, found.num_particles) == ("exact", None, None)
    about = json.loads((tmp_path / "c" / "result.json").read_text())
    assert about["config"]["candidates"] == tried
    assert set(about["versions"]) == {
        "pvae", "python", "torch", "pyro-ppl", "numpy", "scikit-learn",
    }  # fmt: skip
    only_wrong = {**config, "candidates": tried[2:]}
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(OptionError, match="lower n_components"),
    ):
        cells.compute(only_wrong, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_network_cell_on_the_original_scale_is_a_run(tmp_path):
    config = {**network(), "binarize": None, "transform": "dequantize", "likelihood": "gaussian"}
    cells.compute(config, tmp_path / "c")
    found = cells.read(tmp_path / "c")
    run = pvae.load(tmp_path / "c" / "run")
    test = pvae.data.load("digits", transform="dequantize").test
    direct = pvae.evidence.importance(run.model, run.guide, test.x, 5, seed=0)
    assert torch.equal(found.log_p, direct.shifted(test.log_det).log_evidence)
    assert found.unreliable == direct.unreliable
    assert (found.kind, found.num_particles, found.x_dim) == ("estimate", 5, 64)
    before = (tmp_path / "c" / "result.json").stat().st_mtime_ns
    cells.compute(config, tmp_path / "c")
    assert (tmp_path / "c" / "result.json").stat().st_mtime_ns == before


def test_a_damaged_cell_says_so(tmp_path):
    cells.compute(dict(cell("digits", "independent-bits").config), tmp_path / "c")
    tensors = tmp_path / "c" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="is damaged"):
        cells.read(tmp_path / "c")
    (tmp_path / "c" / "result.json").write_text("{}")
    with pytest.raises(RunError):
        cells.read(tmp_path / "c")


# --- segments ------------------------------------------------------------------------------------


def pair_on_digits(z_dim: int = 2) -> tuple[pvae.data.Dataset, VAE, Gaussian]:
    torch.manual_seed(0)
    model = VAE(64, z_dim=z_dim, hidden=(8,))
    guide = Gaussian(64, model.latents, hidden=(8,))
    return pvae.data.load("digits", binarize="fixed"), model, guide


def train_in_segments(folder: Path, *, passes: int, segment: int, z_dim: int = 2) -> pvae.Run:
    data, model, guide = pair_on_digits(z_dim)
    return fit_in_segments(
        model, guide, data, folder, objective=pvae.vae(), passes=passes, segment=segment,
        rate=lambda done: 1 / (1 + done), lr=1e-2, batch_size=500, engine="eager", seed=7,
    )  # fmt: skip


def test_one_segment_is_fit(tmp_path):
    run = train_in_segments(tmp_path, passes=3, segment=5)
    data, model, guide = pair_on_digits()
    weights = [*model.parameters(), *guide.parameters()]
    direct = pvae.fit(
        model, guide, data.train_raw, epochs=3, batch_size=500, engine="eager", seed=mix(7, 0),
        optimizer=torch.optim.Adam(weights, lr=1e-2), progress=False,
        lr_schedule=lambda step: 1 / (1 + step / 3),
    )  # fmt: skip
    assert [row["bound"] for row in run.history] == [row["bound"] for row in direct.history]
    assert torch.equal(run.model.decoder[0].weight, direct.model.decoder[0].weight)
    assert run.num_parameters == direct.num_parameters


def test_segments_differ_in_their_noise_and_go_on_with_the_rate(tmp_path, monkeypatch):
    seen = []

    def noted(*args, **options):
        rates = [options["lr_schedule"](step) for step in (0, 3)]
        seen.append((options["seed"], rates, options["optimizer"].param_groups[0]["lr"]))
        return pvae.fit(*args, **options)

    monkeypatch.setattr("pvae.segments.fit", noted)
    train_in_segments(tmp_path, passes=5, segment=2)
    assert [seed for seed, _, _ in seen] == [mix(7, 0), mix(7, 2), mix(7, 4)]
    assert [rates for _, rates, _ in seen] == [[1, 1 / 2], [1 / 3, 1 / 4], [1 / 5, 1 / 6]]
    assert {lr for _, _, lr in seen} == {1e-2}
    assert [path.name for path in tmp_path.iterdir()] == ["000005"]
    with pytest.raises(RunError, match="is the state of another pair"):
        train_in_segments(tmp_path, passes=9, segment=2, z_dim=3)


def test_a_resumed_state_lies_where_its_parameters_do(tmp_path):
    train_in_segments(tmp_path, passes=1, segment=1)
    _, model, guide = pair_on_digits()
    weights = [*model.to("meta").parameters(), *guide.to("meta").parameters()]
    optimizer = torch.optim.Adam(weights)
    assert _resume(pvae.Run(model, guide, pvae.vae()), optimizer, tmp_path) == 1
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"meta"}
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}


# --- kills ---------------------------------------------------------------------------------------


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[0-9]*"))


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_cell_killed_in_its_training_ends_with_the_same_bytes(tmp_path):
    long = {"passes": 16, "segment": 2, "eps": 1e-4}
    config = network(**long)
    config["training"] = {k: v for k, v in config["training"].items() if k != "steps"}
    final, part = tmp_path / "killed", tmp_path / "killed.part"
    process = subprocess.Popen(
        [sys.executable, "-m", "pvae", "board", "--run-cell", str(final)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=surroundings(),
    )  # fmt: skip
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    wait_for(lambda: part.is_dir() and any(name >= "000004" for name in segments(part)), process)
    process.kill()
    process.wait()
    process.stdin.close()
    done = int(segments(part)[-1])
    assert 4 <= done < 16
    assert not final.exists()
    cells.compute(config, final)
    assert not part.exists()
    cells.compute(config, tmp_path / "whole")
    both = [cells.read(tmp_path / name) for name in ("killed", "whole")]
    assert torch.equal(both[0].log_p, both[1].log_p)
    histories = [pvae.load(tmp_path / name / "run").history for name in ("killed", "whole")]
    bounds = [[(row["epoch"], row["lr"], row["bound"]) for row in rows] for rows in histories]
    assert bounds[0] == bounds[1]
    assert [row["epoch"] for row in histories[0]] == list(range(1, 17))
    assert histories[0][0]["lr"] == 1e-3
    assert histories[0][-1]["lr"] == pytest.approx(1e-3 * 10 ** (-3 / 7))  # passes 13 to 40
    weights = [
        (tmp_path / name / "run/checkpoints/best/tensors.safetensors").read_bytes()
        for name in ("killed", "whole")
    ]
    assert weights[0] == weights[1]


def test_a_killed_command_keeps_what_was_done_and_a_failing_cell_stops_no_other(tmp_path):
    """Killed after its first cell; run again with a data set more, which is nowhere to be had."""
    out, names = tmp_path / "out", ["independent-bits", "bernoulli-mixture"]
    words = ["board", "binary", "--schedule", "smoke", "--jobs", "1", "--out", str(out)]
    words += ["--cells", ",".join(names), "--data"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pvae", *words, "digits"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=surroundings(),
    )  # fmt: skip
    found = board.cells("binary", schedule="smoke", data=["digits"], entries=names)
    first, second = (each.digest for each in found)
    wait_for((out / "cells" / first).exists, process)
    process.kill()
    process.wait()
    before = (out / "cells" / first / "result.json").stat().st_mtime_ns
    (out / "cells" / f".{second}.left").mkdir()
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    again = run_command(
        *words, "digits,nltcs", PVAE_DATA=str(tmp_path), HOME=str(tmp_path), **nowhere
    )
    assert "4 cells, 1 of them are there already" in again.stderr
    assert (out / "cells" / first / "result.json").stat().st_mtime_ns == before
    assert {path.name for path in (out / "cells").iterdir()} == {first, second}
    assert {"board.csv", "board.md", "board.png"} <= {path.name for path in out.iterdir()}

    assert again.returncode == RunError.exit_code
    reason = "nltcs needs binary_density/nltcs.train.data"
    assert again.stderr.splitlines()[-1].startswith(
        f"pvae: error: 2 of 4 cells failed, the first: {reason}"
    )
    assert "Traceback" not in again.stderr
    with (out / "board.csv").open() as file:
        rows = [(row["data"], row["entry"], row["status"]) for row in csv.DictReader(file)]
    assert sorted(rows) == sorted(
        (data, name, status)
        for data, status in (("digits", "ours"), ("nltcs", "failed"))
        for name in names
    )
    assert f"- independent bits failed: {reason}" in (out / "board.md").read_text()
    assert f"independent bits failed: {reason}" in again.stdout
    assert "digits: 360 test data x 64" in again.stdout


def test_an_interrupt_ends_every_process(tmp_path):
    out = tmp_path / "out"
    words = ["board", "binary", "--schedule", "quick", "--data", "digits", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pvae", *words, "--cells", "vae-elbo,vae-dreg-5", "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=surroundings(),
        # A shell's background jobs, and what they start, ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_for(lambda: len(list(out.glob("cells/.*"))) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "pvae: interrupted"
    assert list((out / "cells").iterdir()) == []


def test_leaving_the_loop_ends_the_processes(tmp_path, monkeypatch):
    made, popen = [], subprocess.Popen

    def noted(*args, **options):
        made.append(popen(*args, **options))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    config = dict(cell("digits", "independent-bits").config)
    work = [(tmp_path / "a", {}), (tmp_path / "b", config), (tmp_path / "c", config)]
    outcomes = workers.run_all(work, jobs=2)
    first = next(outcomes)
    assert (first.index, first.reason is None) in ((0, False), (1, True))
    outcomes.close()
    assert len(made) >= 2
    assert all(process.poll() is not None for process in made)


def test_a_process_without_a_parent_ends(tmp_path):
    config = dict(cell("digits", "vae-elbo").config)
    config["training"] = {**SMALL, "passes": 10**6, "segment": 10, "eps": 1e-4}
    process = subprocess.Popen(
        [sys.executable, "-m", "pvae", "board", "--run-cell", str(tmp_path / "c")],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=surroundings(),
    )  # fmt: skip
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    wait_for((tmp_path / "c.part").exists, process)
    process.stdin.close()
    assert process.wait(60) == 1


# --- the command ---------------------------------------------------------------------------------


def test_a_killed_cell_says_by_what(tmp_path):
    worker = workers.run_all([(tmp_path / "c", network(passes=10**6, segment=1, eps=1e-4))], jobs=1,
                             started=lambda _: None)  # fmt: skip
    before = set(_children())

    def kill_it() -> None:
        while not (mine := set(_children()) - before):
            time.sleep(0.01)
        os.kill(mine.pop(), signal.SIGKILL)

    import threading

    thread = threading.Thread(target=kill_it)
    thread.start()
    outcome = next(worker)
    thread.join()
    assert outcome.reason == "its process was ended by SIGKILL"


def _children() -> list[int]:
    path = Path(f"/proc/{os.getpid()}/task")
    if not path.is_dir():
        pytest.skip("/proc is needed to find the process")
    pids = []
    for task in path.iterdir():
        with contextlib.suppress(OSError):
            pids += map(int, (task / "children").read_text().split())
    return pids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["binry"], "no board is called 'binry': did you mean 'binary'?"),
        (
            ["binary", "--data", "nltc"],
            "no data set of the binary board is called 'nltc': did you mean 'nltcs'?",
        ),
        (
            ["binary", "--cells", "vae-elb"],
            "no cell of the binary board is called 'vae-elb': did you mean 'vae-elbo'?",
        ),
        (
            ["binary", "--schedule", "fast"],
            "no schedule is called 'fast': choose from quick, reduced, smoke",
        ),
        (["binary", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["binary", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["binary", "--jobs", "many"], "--jobs: expected a whole number, got 'many'"),
    ],
)
def test_wrong_inputs_are_one_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["board", *words]) == OptionError.exit_code
    assert capsys.readouterr().err == f"pvae: error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def shared_command(out: Path) -> subprocess.Popen[str]:
    names = "independent-bits,bernoulli-mixture,vae-elbo,vae-dreg-5"
    words = ["board", "binary", "--schedule", "smoke", "--data", "digits"]
    return subprocess.Popen(
        [sys.executable, "-m", "pvae", *words, "--cells", names, "--jobs", "1", "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings(),
    )  # fmt: skip


def test_two_commands_in_one_folder_compute_each_cell_once(tmp_path):
    commands = [shared_command(tmp_path) for _ in range(2)]
    said = [command.communicate(timeout=300) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    computed = [re.findall(r"\] (.*): [\d.]+ s$", errors, re.MULTILINE) for _, errors in said]
    assert all(computed), "both have work"
    assert len(computed[0] + computed[1]) == len({*computed[0], *computed[1]}) == 4
    assert len(list((tmp_path / "cells").iterdir())) == 4
    assert all("board.csv, board.md" in output for output, _ in said)
    with (tmp_path / "board.csv").open() as file:
        assert {row["status"] for row in csv.DictReader(file)} == {"ours"}


def holder(path: Path) -> subprocess.Popen:
    """A process that has the claim at ``path`` until it is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "import fcntl, sys; f = open(sys.argv[1], 'a');"
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_cells_of_a_killed_command_are_taken_over(tmp_path):
    cells = board.cells("binary", schedule="smoke", data=["digits"], entries=["vae-elbo"])
    first = holder(tmp_path / ".claims" / cells[0].digest)
    left = tmp_path / "cells" / f".{cells[0].digest}.left"
    left.mkdir(parents=True)
    second = shared_command(tmp_path)

    def done() -> list[Path]:
        return [path for path in tmp_path.glob("cells/*") if len(path.name) == 64]

    wait_for(lambda: len(done()) == 3, second)
    assert cells[0].digest not in {path.name for path in done()}
    assert second.poll() is None, "the claimed cell is waited for"
    first.kill()
    first.communicate()
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert len(done()) == 4
    assert not left.exists()


def test_a_claim_is_held_by_one_and_ends_with_its_process(tmp_path):
    mine = locks.claim(tmp_path / "claims" / "a")
    assert mine is not None
    assert locks.claim(tmp_path / "claims" / "a") is None
    mine.close()
    other = holder(tmp_path / "claims" / "a")
    assert locks.claim(tmp_path / "claims" / "a") is None
    other.kill()
    other.communicate()
    again = locks.claim(tmp_path / "claims" / "a")
    assert again is not None
    again.close()
