"""``config.yaml``: every option of a run, with what older runs lack of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae.errors import OptionError, RunError
from pvae.runs.files import read_yaml, write_yaml

__all__ = ["DEFAULTS", "read_config", "write_config"]

DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "model_options": {},
    "guide": "auto",
    "guide_options": {},
    "objective": "vae",
    "objective_options": {},
    "game": None,
    "game_options": {},
    "data": "digits",
    "binarize": None,
    "transform": None,
    "labels": None,
    "data_size": None,
    "data_unreadable": "stop",
    "epochs": 150,
    "batch_size": 64,
    "bucket_by": None,
    "optimizer": "adam",
    "lr": 2e-3,
    "lr_schedule": "cosine",
    "clip_norm": None,
    "alternate": None,
    "patience": 20,
    "parts": None,
    "seed": 0,
    "device": "auto",
    "engine": "auto",
    "precision": "full",
    "checkpoint_every": "5 minutes",
    "keep_checkpoints": 2,
    "on_nan": "stop",
    "track": None,
    "pictures": None,
}
_LATER = (
    "alternate",
    "bucket_by",
    "checkpoint_every",
    "keep_checkpoints",
    "data_size",
    "data_unreadable",
    "game",
    "game_options",
    "labels",
    "on_nan",
    "parts",
    "pictures",
    "track",
)  # older runs lack them


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The configuration of a run folder.

    Raises:
        RunError: the folder is missing, or is not one that ``pvae train`` wrote.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}: give one that pvae train wrote")
    if not (folder / "config.yaml").is_file():
        if (folder / "checkpoints").is_dir():
            raise RunError(
                f"{folder} has checkpoints but no config.yaml, so its programs are not known: a "
                "folder of pvae.fit is read by the same call again, with resume=True"
            )
        raise RunError(
            f"{folder} is no run folder (it has no config.yaml): give one that pvae train wrote"
        )
    try:
        config = read_yaml(folder / "config.yaml")
    except OptionError as error:
        raise RunError(f"{folder} is damaged: {error}") from None
    config = {name: DEFAULTS[name] for name in _LATER} | config
    missing = [key for key in (*DEFAULTS, "data_facts") if key not in config]
    if missing:
        raise RunError(f"{folder / 'config.yaml'} has no {missing[0]!r}: train the run again")
    if not isinstance(config["model"], str):
        raise RunError(
            f"{folder / 'config.yaml'}: 'model' is {config['model']!r}, expected a name: put back "
            "what stood there, or train the run again"
        )
    for key, default in DEFAULTS.items():
        if not isinstance(config[key], _kinds(default)):
            raise RunError(
                f"{folder / 'config.yaml'}: {key!r} was of the kind of {default!r} and is "
                f"{config[key]!r}: put back what stood there, or train the run again"
            )
    if not isinstance(config["data_facts"], dict):
        raise RunError(f"{folder / 'config.yaml'}: 'data_facts' is damaged: train the run again")
    return config


def _kinds(default: Any) -> Any:
    """The types that a value may have where the default is this."""
    if isinstance(default, (int, float)):
        return (int, float, type(None))
    return object if default is None else (type(default), type(None))


def write_config(folder: Path, config: Mapping[str, Any], *, sources: bool = True) -> None:
    """Write ``config.yaml``, and copies of the user's own files under ``source/``."""
    from pvae.checkpoints import write_aside

    for name, file in (_user_files(config) if sources else {}).items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        write_aside(folder / "source" / name, file.read_bytes())
    write_yaml(folder / "config.yaml", config)


def _user_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """Name under ``source/`` -> file; one called as another before lies in a folder of its role."""
    found: dict[str, Path] = {}
    for role in ("model", "guide", "game"):
        place = Path(str(config.get(role)).partition(":")[0])
        if place.suffix == ".py" and place not in found.values():
            found[f"{role}/{place.name}" if place.name in found else place.name] = place
    return found
