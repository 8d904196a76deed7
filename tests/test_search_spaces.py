"""Search spaces: what is understood, what is refused, and where a trial's values go."""

from __future__ import annotations

import pytest

from pvae.errors import OptionError
from pvae.search_spaces import Choice, Layers, Real, Whole, configure, corners, parse, parse_all

CONFIG = {
    "model": "vae",
    "lr": 2e-3,
    "batch_size": 64,
    "clip_norm": None,
    "alternate": None,
    "optimizer": "adam",
    "model_options": {"z_dim": 4},
    "guide_options": {},
    "objective_options": {},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log:1e-4..1e-2", Real(1e-4, 1e-2, log=True)),
        ("0.0..0.5", Real(0.0, 0.5)),
        ("-1..0.5", Real(-1.0, 0.5)),
        ("2..32", Whole(2, 32)),
        ("log:2..64", Whole(2, 64, log=True)),
        ("silu|tanh|relu", Choice(("silu", "tanh", "relu"))),
        ("[64]|[64, 64]", Choice(("[64]", "[64, 64]"))),
        ("layers:1..3x32..256", Layers(Whole(1, 3), Whole(32, 256, log=True))),
        ("layers:2x64", Layers(Whole(2, 2), Whole(64, 64, log=True))),
    ],
)
def test_a_space_is_read(text, expected):
    assert parse("name", text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5..2", "low <= high"),
        ("log:0..1", "0 < low <= high"),
        ("nan..1", "finite ends"),
        ("a..b", "no numbers"),
        ("1..", "no numbers"),
        ("silu", "varies nothing"),
        ("silu|silu", "varies nothing"),
        ("silu||tanh", "varies nothing"),
        ("", "varies nothing"),
        ("layers:2", "DEPTHxWIDTH"),
        ("layers:0..2x8", "whole numbers >= 1"),
        ("layers:1..2x0.5..2", "whole numbers >= 1"),
    ],
)
def test_nonsense_is_refused(text, message):
    with pytest.raises(OptionError, match=message):
        parse("name", text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "needs something to vary"),
        (["lr"], "NAME=SPACE"),
        (["=1..2"], "NAME=SPACE"),
        (["lr=1..2", "--lr=1..3"], "names lr twice"),
    ],
)
def test_a_list_of_spaces_is_checked(texts, message):
    with pytest.raises(OptionError, match=message):
        parse_all(texts)


def test_values_go_where_their_names_say():
    values = {
        "lr": 0.1, "both.hidden": [8, 8], "model.z_dim": 2, "objective.num_particles": 5,
        "batch_size": "128", "clip_norm": "none", "alternate": "3", "optimizer": "sgd",
    }  # fmt: skip
    made = configure(CONFIG, values)
    assert made["lr"] == 0.1
    assert made["model_options"] == {"z_dim": 2, "hidden": [8, 8]}
    assert made["guide_options"] == {"hidden": [8, 8]}
    assert made["objective_options"] == {"num_particles": 5}
    assert made["batch_size"] == 128
    assert made["clip_norm"] is None
    assert made["alternate"] == 3
    assert made["optimizer"] == "sgd"
    assert CONFIG["model_options"] == {"z_dim": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"z_dim": 2}, "model.z_dim"),
        ({"decoder.hidden": [2]}, "got 'decoder'"),
        ({"model_options": 1}, "no option --model_options"),
        ({"lr": "fast"}, "no number"),
        ({"batch_size": "1.5"}, "no whole number"),
        ({"batch_size": 1.5}, "1.5 is no whole number"),
        ({"optimizer": 1}, "1 is no word"),
    ],
)
def test_names_and_values_that_do_not_exist(values, message):
    with pytest.raises(OptionError, match=message):
        configure(CONFIG, values)


def test_corners_touch_every_end_and_every_choice():
    space = parse_all(["lr=log:1e-4..1e-2", "a=x|y|z", "h=layers:1..3x4..8", "n=2..5"])
    found = corners(space)
    assert {values["a"] for values in found} == {"x", "y", "z"}
    assert {values["lr"] for values in found} == {1e-4, 1e-2}
    assert {values["n"] for values in found} == {2, 5}
    assert [4] in [v["h"] for v in found]
    assert [8, 8, 8] in [v["h"] for v in found]
