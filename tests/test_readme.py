"""The README's own code is run as it stands: its model as a file, its commands, its Python.

So are the three programs of docs/programs.md.
"""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import pvae
from pvae.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = (Path(__file__).parents[1] / "docs" / "programs.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [text for tag, text in found if tag == language]


def test_the_model_of_ones_own_trains_from_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(blocks("python")[0])
    (commands,) = [b for b in blocks("") if "./mine.py:Mine" in b]
    train, evaluate = (shlex.split(line)[1:] for line in commands.strip().splitlines())
    assert main([*train, "--epochs", "1"]) == 0
    assert main([*evaluate, "--num-particles", "20"]) == 0
    assert "nats" in capsys.readouterr().out


def test_its_number_is_checked_by_the_commands_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(blocks("python")[0])
    assert main(["train", "./mine.py:Mine", "--data", "digits", "--epochs", "2"]) == 0
    (commands,) = [b for b in blocks("") if "pvae diagnose" in b]
    evaluate, diagnose = (shlex.split(line)[1:] for line in commands.strip().splitlines())
    assert main([*evaluate, "--num-particles", "50", "--budget", "100"]) == 0
    assert "tolerance not met" in capsys.readouterr().out
    small = ["--num-data", "20", "--num-particles", "20", "--num-runs", "200"]
    assert main([*diagnose, *small]) == 0
    assert "amortisation" in capsys.readouterr().out
    assert (tmp_path / "runs/mine-digits-1/figures/gaps.png").exists()


def test_the_python_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pvae, "fit", functools.partial(pvae.fit, epochs=1, progress=False))
    model, usage = blocks("python")
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(model, "README.md", "exec"), names)
    exec(compile(usage, "README.md", "exec"), names)
    assert "nats" in capsys.readouterr().out


def test_three_programs_of_the_docs_train_and_are_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = [block for block in blocks("python", PROGRAMS) if block.startswith("# three.py")]
    (tmp_path / "three.py").write_text(program)
    rng = np.random.default_rng(0)
    np.savetxt("counts.csv", rng.poisson(2.0, (60, 4)), fmt="%d", delimiter=",")
    for name in ("rows.csv", "schools.csv"):
        np.savetxt(name, rng.normal(size=(60, 3)), delimiter=",", header="a,b,c", comments="")
    (commands,) = [block for block in blocks("", PROGRAMS) if "./three.py" in block]
    lines = [shlex.split(line)[1:] for line in commands.strip().splitlines()]
    for line, samples in zip(lines, (0, 2, 0), strict=True):
        run = str(tmp_path / line[1].partition(":")[2])
        assert main([*line, "--epochs", "1", "--engine", "eager", "--run-dir", run]) == 0
        assert main(["evaluate", run, "--num-particles", "5"]) == 0
        assert main(["sample", run]) == samples
        assert "change of scale" not in capsys.readouterr().err


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets(target):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"make {target} " in README
    assert f"\n{target}:" in makefile
