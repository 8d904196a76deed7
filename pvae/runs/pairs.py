"""Model and guide, built from a configuration and what is known of the data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae import catalogue
from pvae.errors import OptionError, ProgramError, PvaeError, first_line
from pvae.runs.datasets import batch_for

__all__ = ["find", "pair"]


def pair(config: dict[str, Any], known: Mapping[str, Any], *, folder: Path | None = None) -> Any:
    """Construct model and guide from a configuration and what is known of the data.

    Args:
        config: A resolved configuration.
        known: ``x_dim``, ``num_levels``, ``image_shape``, ``x_mean``, ``x_scale``,
            ``example_batch`` with ``example_labels``.
        folder: The run folder, whose copy stands in for a user's file that is gone or changed.

    Returns:
        The model and the guide.

    Raises:
        ProgramError: one of them cannot be found or built.
    """
    import torch

    known = dict(known)
    if known.get("image_shape") is not None:
        known["image_shape"] = tuple(known["image_shape"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        source = find("model", config["model"], folder)
        model = _construct(source, config["model_options"], known)
        guide_source = find("guide", config["guide"], folder)
        wanted = catalogue.option_names(guide_source.factory) if guide_source.is_class else []
        known["model"] = model
        if "latents" in wanted:
            known["latents"] = _latents(model, source.name, guide_source.name)
        if "example_batch" in wanted and "example_batch" in known:
            rows, labels = known["example_batch"], known.get("example_labels")
            known["example_batch"] = batch_for(model, rows, labels)
        return model, _construct(guide_source, config["guide_options"], known)


def find(role: str, reference: str, folder: Path | None) -> catalogue.Program:
    """A program by its name; the copy in a run folder stands in for a file gone or changed."""
    place = Path(reference.partition(":")[0])
    if folder is None or place.suffix != ".py":
        return catalogue.find(role, reference)
    own = folder / "source" / role / place.name  # where two files have one name
    copy = own if own.is_file() else folder / "source" / place.name
    if place.is_file() and copy.is_file() and place.read_bytes() != copy.read_bytes():
        warnings.warn(
            f"{place.name} has changed since the training: the copy in the run folder is used",
            UserWarning,
            stacklevel=2,
        )
    elif place.is_file():
        return catalogue.find(role, reference)
    return catalogue.find(role, reference, copy=copy)


def _latents(model: Any, name: str, guide: str) -> Any:
    latents = getattr(model, "latents", None)
    if latents is None:
        raise ProgramError(
            f"the {guide} guide needs to know the latent sites, and model {name} has no 'latents' "
            "property (site -> event shape): add one, or give your own --guide"
        )
    return latents


def _construct(
    source: catalogue.Program, options: Mapping[str, Any], known: Mapping[str, Any]
) -> Any:
    if not source.is_class:
        return source.factory
    wanted = catalogue.option_names(source.factory)
    offered = [name for name in catalogue.filled_names if name in wanted]
    filled = {name: known[name] for name in offered if known.get(name) is not None}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            return _checked(source.name, source.factory(**{**filled, **options}), options)
    except PvaeError:
        raise
    except Exception as error:
        blamed = catalogue.blame(error)
        small = _too_small(options)
        if small is not None:
            place = "" if blamed is None else f" ({blamed.partition(': ')[0]})"
            raise ProgramError(
                f"{source.name} cannot be built with {small}: give sizes of at least 1{place}"
            ) from error
        reason = blamed or f"{type(error).__name__}: {first_line(error)}"
        raise ProgramError(
            f"{source.name} cannot be built with these options ({reason})"
        ) from error


def _too_small(options: Mapping[str, Any]) -> str | None:
    """The options that hold a whole number below one, in words."""
    small = {
        name: value
        for name, value in options.items()
        for entry in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(entry, int) and not isinstance(entry, bool) and entry < 1
    }
    return ", ".join(f"{name} = {value}" for name, value in small.items()) or None


def _checked(name: str, program: Any, options: Mapping[str, Any]) -> Any:
    """Refuse a size of zero, which torch takes, and what is no program."""
    if not callable(program):
        raise ProgramError(
            f"{name} makes a {type(program).__name__}, which cannot be called: give a function, or "
            "a class with forward"
        )
    small = _too_small(options)
    for parameter, value in getattr(program, "named_parameters", list)():
        if value.numel() == 0:
            reason = f", with {small}" if small is not None else ""
            raise OptionError(
                f"{name} has an empty parameter {parameter!r} of shape {tuple(value.shape)}"
                f"{reason}: give sizes of at least 1"
            )
    return program
