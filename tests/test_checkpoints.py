"""Checkpoints: any damage is named, the one before is used, nothing is deleted or half-written."""

from __future__ import annotations

import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import checkpoints
from pvae.cli import main
from pvae.errors import RunError
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.resumption import Saver


def contents(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(5, 3, generator=generator),
        "double": torch.randn(4, generator=generator).double(),
        "count": torch.tensor(step),
        "empty": torch.zeros(0, 2),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, of steps 10 and 20."""
    for step in (10, 20):
        checkpoints.write_checkpoint(tmp_path, step, contents(step), {"history": [{"bound": -1.5}]})
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def newest_step(root: Path) -> int:
    found = checkpoints.newest(root)
    assert found is not None
    step = found[1][1]["step"]
    assert all(torch.equal(found[1][0][name], value) for name, value in contents(step).items())
    return step


def test_what_was_written_is_read(root):
    folder, (tensors, about) = checkpoints.newest(root)
    assert folder.name == "step-00000020"
    assert about["history"] == [{"bound": -1.5}]
    assert about["tensors"]["weight"] == [5, 3]
    for name, value in contents(20).items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_tensors_that_share_memory_are_kept(tmp_path):
    whole = torch.arange(6.0)
    checkpoints.save_tensors(tmp_path, {"whole": whole, "part": whole[:2], "again": whole}, {})
    tensors, _ = checkpoints.load_tensors(tmp_path)
    assert torch.equal(tensors["part"], whole[:2])
    assert torch.equal(tensors["again"], whole)


def test_300_of_300_bit_flips_are_detected_and_named(root):
    """RELIABILITY A2; the earlier checkpoint is used each time, and nothing is deleted."""
    chance, detected = random.Random(0), 0
    files = sorted((root / "step-00000020").iterdir())
    sizes = [path.stat().st_size for path in files]
    for path in chance.choices(files, sizes, k=300):
        whole = path.read_bytes()
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(spoilt))
        before = everything(root)
        with pytest.warns(UserWarning, match=r"step-00000020/(manifest|tensors)\.") as caught:
            detected += newest_step(root) == 10
        assert "damaged" in str(caught[0].message) or "names a file" in str(caught[0].message)
        assert everything(root) == before
        path.write_bytes(whole)
    assert detected == 300
    assert newest_step(root) == 20


def test_64_of_64_truncations_are_detected(root):
    detected = 0
    for path in (root / "step-00000020").iterdir():
        whole = path.read_bytes()
        lengths = {0, len(whole) - 1} | {k * len(whole) // 31 for k in range(31)}
        for length in sorted(lengths)[:32]:
            path.write_bytes(whole[:length])
            with pytest.warns(UserWarning, match="step-00000020"):
                detected += newest_step(root) == 10
        path.write_bytes(whole)
    assert detected == 64


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_missing_and_swapped_files_are_named(root, name):
    one, two = root / "step-00000010" / name, root / "step-00000020" / name
    kept = [one.read_bytes(), two.read_bytes()]
    two.unlink()
    with pytest.warns(UserWarning, match=f"no readable {name}"):
        assert newest_step(root) == 10
    one.write_bytes(kept[1])
    two.write_bytes(kept[0])
    with (
        pytest.warns(UserWarning, match="step-000000[12]0"),
        pytest.raises(RunError, match="step-00000020"),
    ):
        checkpoints.newest(root)


def test_a_checkpoint_under_another_name_is_refused(root):
    (root / "step-00000020").rename(root / "step-00000030")
    with pytest.warns(UserWarning, match="manifest is that of step 20"):
        assert newest_step(root) == 10


def test_manifests_of_before_there_was_a_seal_are_read(tmp_path):
    checkpoints.save_tensors(tmp_path, contents(1), {})
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    kept = [line for line in lines if "format" not in line and "manifest_sha256" not in line]
    (tmp_path / "manifest.json").write_text("\n".join(kept))
    assert checkpoints.load_tensors(tmp_path)[0].keys() == contents(1).keys()
    (tmp_path / "manifest.json").write_text("\n".join(x for x in lines if "format" not in x))
    with pytest.raises(RunError, match="damaged"):
        checkpoints.load_tensors(tmp_path)


def test_older_checkpoints_go_and_one_of_the_same_step_is_never_replaced(tmp_path):
    for step in (10, 20, 30):
        checkpoints.write_checkpoint(tmp_path, step, contents(step), {}, keep=2)
    assert [path.name for path in checkpoints.steps(tmp_path)] == ["step-00000020", "step-00000030"]
    checkpoints.write_checkpoint(tmp_path, 30, contents(30), {"later": True}, keep=2)
    names = [path.name for path in checkpoints.steps(tmp_path)]
    assert names == ["step-00000030", "step-00000030-2"]
    assert checkpoints.newest(tmp_path)[1][1]["later"]


# --- faults while a checkpoint is written --------------------------------------------------------


class Fault(Exception):
    """What a process that dies here would not live to see."""


def fail(*_, **__):
    raise Fault


def half_written(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])
    raise Fault


FAULTS = {
    "before write": ("pvae.checkpoints._write", fail, 20),
    "mid-write": ("pvae.checkpoints._write", half_written, 20),
    "before fsync": ("os.fsync", fail, 20),
    "before rename": ("pathlib.Path.replace", fail, 20),
    "after rename": ("pvae.checkpoints._flush_folder", None, 30),
    "before prune": ("pvae.checkpoints._discard", fail, 30),
}


@pytest.mark.parametrize("cleans", [True, False], ids=["fault", "death"])
@pytest.mark.parametrize("point", FAULTS)
def test_a_fault_at_any_point_leaves_a_whole_checkpoint(root, monkeypatch, point, cleans):
    """With what was half-written removed (a fault), and left behind (a death)."""
    target, wrong, expected = FAULTS[point]
    flush = checkpoints._flush_folder

    def after_rename(folder: Path) -> None:
        flush(folder)
        if folder == root:
            raise Fault

    with monkeypatch.context() as context:
        context.setattr(target, wrong or after_rename)
        if not cleans:
            context.setattr("pathlib.Path.unlink", lambda *_, **__: None)
            context.setattr("pvae.checkpoints._remove", lambda *_: None)
        with pytest.raises(Fault):
            checkpoints.write_checkpoint(root, 30, contents(30), {}, keep=2)
    assert newest_step(root) == expected
    hidden = [path.name for path in root.iterdir() if path.name.startswith(".")]
    assert not (cleans and hidden)
    checkpoints.write_checkpoint(root, 40, contents(40), {}, keep=2)
    assert newest_step(root) == 40
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    assert len(checkpoints.steps(root)) == 2


@pytest.mark.parametrize("point", FAULTS)
def test_a_training_goes_on_after_a_fault_in_any_of_its_checkpoints(tmp_path, monkeypatch, point):
    """Each checkpoint of a training meets the fault once; its end is that of an undisturbed one."""
    target, wrong, _ = FAULTS[point]
    flush, met, tries = checkpoints._flush_folder, set(), 0
    save = Saver.save

    def noted(self, where, *rest):
        with monkeypatch.context() as context:
            if where.step not in met:
                met.add(where.step)
                context.setattr(target, wrong or after_rename)
            save(self, where, *rest)

    def after_rename(folder: Path) -> None:
        flush(folder)
        if folder.name == "checkpoints":
            raise Fault

    def fitted(folder: Path, **options) -> list[Tensor]:
        torch.manual_seed(0)
        model = VAE(4, z_dim=1, hidden=(3,), likelihood="gaussian")
        guide = Gaussian(4, model.latents, hidden=(3,))
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
        pvae.fit(
            model, guide, x, epochs=3, batch_size=6, run_dir=folder, engine="eager",
            checkpoint_every="2 steps", progress=False, **options,
        )  # fmt: skip
        return [p.detach() for p in (*model.parameters(), *guide.parameters())]

    whole = fitted(tmp_path / "whole")
    monkeypatch.setattr(Saver, "save", noted)
    for tries in range(20):  # noqa: B007
        try:
            found = fitted(tmp_path / "faulty", resume=True)
            break
        except Fault:
            continue
    assert met == {2, 4, 6}
    assert tries == (1 if point == "before prune" else 3)  # nothing to prune at first
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


# --- the disk ------------------------------------------------------------------------------------

WORDS = [
    "factor-analysis", "--epochs", "6", "--model.z_dim", "2", "--guide.hidden", "[4]",
    "--checkpoint-every", "1 epoch", "--engine", "eager", "--run-dir", "run",
]  # fmt: skip


def test_a_full_disk_is_one_line_and_the_previous_checkpoint_loads(tmp_path, monkeypatch, capsys):
    """The limit of a file's size stands for the disk: the write itself fails, in the kernel."""
    monkeypatch.chdir(tmp_path)
    save, before = Saver.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    count = {"saved": 0}

    def fills(*arguments):
        count["saved"] += 1
        if count["saved"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        save(*arguments)

    monkeypatch.setattr(Saver, "save", fills)
    try:
        code = main(["train", *WORDS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 74
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pvae:")]
    assert len(errors) == 1
    assert "tensors.safetensors: File too large" in errors[0]
    saved = [path.name for path in checkpoints.steps(Path("run/checkpoints"))]
    assert saved == ["step-00000020", "step-00000040"]
    assert not list(Path("run").rglob("*.tmp"))
    with pytest.warns(UserWarning, match="interrupted in epoch 3; the best parameters of step-0"):
        run = pvae.load("run")
    assert run.stopped == "interrupted"
    assert run.best_epoch == 2
    monkeypatch.setattr(Saver, "save", save)
    assert main(["train", "--resume", "run"]) == 0
    assert pvae.load("run").stopped == "epochs"


def test_a_device_without_space_is_an_error_with_the_files_name():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints._write(Path("/dev/full"), b"x" * 10)


def test_a_folder_that_became_read_only_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    count = {"made": 0}
    mkdir = Path.mkdir

    def refused(self, *rest, **options):
        if self.name == ".step.tmp":
            count["made"] += 1
            if count["made"] == 3:
                raise PermissionError(13, "Permission denied", str(self))
        return mkdir(self, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert main(["train", *WORDS]) == 74
    assert "Permission denied" in capsys.readouterr().err.splitlines()[-1]
    with pytest.warns(UserWarning, match="interrupted"):
        assert pvae.load("run").best_epoch == 2
    if os.getuid():  # root writes everywhere
        Path("run/checkpoints").chmod(0o500)
        assert main(["train", "--resume", "run"]) == 74
        Path("run/checkpoints").chmod(0o700)


def test_a_finished_run_outlives_the_loss_of_its_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *WORDS]) == 0
    whole = pvae.load("run")
    shutil.rmtree("run/checkpoints/best")
    with pytest.warns(UserWarning, match="the best parameters of step-00000120 are used"):
        run = pvae.load("run")
    pairs = zip(whole.model.parameters(), run.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert isinstance(run.model, nn.Module)
