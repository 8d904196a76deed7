"""Mutated configurations and data files: taken, or refused by one error in one line; no traceback.

``PVAE_FUZZ=20000`` tries more than CI does.
"""

from __future__ import annotations

import io
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvae import catalogue, cli, data, runs
from pvae.commands import train
from pvae.commands.programs import Programs
from pvae.errors import PvaeError

CONFIGURATIONS = int(os.environ.get("PVAE_FUZZ", "500"))
FILES = int(os.environ.get("PVAE_FUZZ", "200"))
COMMON: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}

GOOD = {
    "model": "vae", "guide": "gaussian", "objective": "iwae", "data": "digits", "epochs": 2,
    "lr": 1e-3, "batch_size": 32, "seed": 0, "model_options": {"z_dim": 4, "hidden": [8]},
    "guide_options": {"hidden": [8]}, "objective_options": {"num_particles": 3},
}  # fmt: skip

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(["1e3", "0x10", ".nan", "-.inf", "~", "yes", "[", "{",
                     "!!python/name:os.system", "../../etc", "vae",
                     "gausian", "1e-3", "NaN", "08", "1_000", "2026-11-25"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.one_of(
    st.sampled_from([*GOOD, *runs.DEFAULTS, "lrr", "epoch", "model_option", "", "pvae"]),
    st.text(max_size=8),
)
broken = st.sampled_from(
    ["", "\t", "\ufeff", "lr: 1\nlr: 2\n", "- a\n- b\n", "a: [1, 2\n", "a: {b: }", "---\n---\n",
     "lr: 1e3\n", "lr:\t1\n", "&a [*a]", "{" * 300, "x: !!binary aGk=\n", "? [a]\n: b\n", "\x00"]
)  # fmt: skip


@st.composite
def configurations(draw: Any) -> str:
    """YAML near a good configuration: keys and values replaced, added, dropped; or broken text."""
    import yaml

    content: dict[Any, Any] = {**GOOD}
    for _ in range(draw(st.integers(1, 3))):
        place = draw(
            st.sampled_from(["top", "model_options", "guide_options", "objective_options"])
        )
        if place == "top":
            content[draw(names)] = draw(values)
        elif isinstance(content.get(place), dict):
            content[place] = {**content[place], draw(st.text(max_size=8) | names): draw(values)}
    if draw(st.booleans()):
        content.pop(draw(st.sampled_from(list(GOOD))), None)
    text: str = yaml.safe_dump(content, allow_unicode=True)
    return draw(broken) + text if draw(st.integers(0, 9)) == 0 else text


@settings(max_examples=CONFIGURATIONS, suppress_health_check=list(HealthCheck), **COMMON)
@given(text=configurations())
def test_configurations(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    taken: list[dict[str, Any]] = []

    def take(config: dict[str, Any], programs: Any, run_dir: str | None) -> None:
        taken.append(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", take)
        patch.chdir(folder)
        said = io.StringIO()
        patch.setattr("sys.stderr", said)
        code = cli.main(["train", "--config", "c.yaml"])
    lines = said.getvalue().strip().splitlines()
    assert code == (0 if taken else 2), said.getvalue()
    assert "Traceback" not in said.getvalue()
    if not taken:
        assert lines[-1].startswith("pvae: error: "), lines
        assert "--debug" not in lines[-1], lines  # an error that nobody foresaw says so
    assert [path.name for path in folder.iterdir()] == ["c.yaml"]


def base(kind: str) -> bytes:
    """A small good file of each format."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, 3)).astype(np.float32)
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, x)
    elif kind == "npz":
        np.savez(buffer, train=x, test=x[:5], train_labels=np.arange(20))
    elif kind == "csv":
        np.savetxt(buffer, x, delimiter=",")
    else:
        buffer.write("\n".join(["the cat sat on the mat", "a dog", "birds sing"] * 8).encode())
    return buffer.getvalue()


KINDS = ("npy", "npz", "csv", "txt")


def mutated(content: bytes, seed: int) -> bytes:
    """A few bytes flipped, dropped, doubled or cut, at random places, the header more often."""
    chance = random.Random(seed)
    mutable = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        reach = len(mutable) if chance.random() < 0.5 else min(len(mutable), 140)
        if not reach:
            break
        place = chance.randrange(reach)
        match chance.randrange(5):
            case 0:
                mutable[place] ^= 1 << chance.randrange(8)
            case 1:
                mutable[place] = chance.randrange(256)
            case 2:
                del mutable[place : place + chance.randrange(1, 20)]
            case 3:
                mutable[place:place] = mutable[place : place + 10]
            case _:
                del mutable[place:]
    return bytes(mutable)


@pytest.mark.parametrize("kind", KINDS)
def test_data_files(kind: str, tmp_path: Path) -> None:
    content, refused = base(kind), {}
    for seed in range(FILES // len(KINDS)):
        path = tmp_path / f"x{seed}.{kind}"
        path.write_bytes(mutated(content, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert len(data.load(str(path)).train) > 0
            except PvaeError as error:
                refused[path.name] = str(error)
    assert refused
    assert all(name in said and "\n" not in said for name, said in refused.items()), refused


def test_a_good_configuration_is_taken() -> None:
    """The fuzz would prove nothing if everything were refused."""
    programs = Programs(GOOD)
    assert programs.read("model", GOOD["model_options"]) == {"z_dim": 4, "hidden": [8]}
    assert catalogue.build_objective("iwae", {"num_particles": 3}).num_particles == 3
