"""What the commands that use a trained run do: encode, reconstruct, interpolate, traverse, ood."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.commands.preparing import data_for, threads
from pvae.commands.programs import need_encoder
from pvae.commands.saying import say, watched
from pvae.errors import DataError, OptionError, ProgramError

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["encode", "interpolate", "out_of_distribution", "reconstruct", "traverse"]


def encode(arguments: argparse.Namespace) -> None:
    """``pvae encode``: posterior means, scales and draws of every latent site, as an ``.npz``."""
    _at_least("num-draws", arguments.num_draws, 0)
    run, dataset = _opened(arguments)
    split = getattr(dataset, arguments.split)
    target = _target(arguments, f"latents-{arguments.split}.npz", ".npz")
    from pvae import latents

    with threads(dataset):
        codes = latents.encode(
            run.model, run.guide, split.x, num_draws=max(1, arguments.num_draws),
            seed=arguments.seed,
        )  # fmt: skip
    arrays = {f"{site}_mean": value for site, value in codes.mean.items()}
    arrays |= {f"{site}_scale": value for site, value in codes.scale.items()}
    if arguments.num_draws:
        arrays |= {f"{site}_draws": value for site, value in codes.draws.items()}
    if split.labels is not None:
        arrays["labels"] = split.labels
    digest = _write_arrays(target, arrays)
    sites = ", ".join(f"{site} {tuple(value.shape[1:])}" for site, value in codes.mean.items())
    say(f"{dataset.description()}; {arguments.split} split, {len(codes)} data; latents {sites}")
    say(f"wrote {target} (SHA-256 {digest})")


def reconstruct(arguments: argparse.Namespace) -> None:
    """``pvae reconstruct``: data beside what the model makes of their latents."""
    _at_least("size", arguments.size, 1)
    run, dataset = _opened(arguments)
    rows = dataset.test.x[: arguments.size]
    target = _target(arguments, "figures/reconstructions_of_test.png", ".png", ".npy")
    from pvae import galleries, latents, plots

    site = _observed(run, rows)
    made = latents.reconstruct(
        run.model, run.guide, rows, num_draws=arguments.num_draws, seed=arguments.seed
    )[site]
    x, y = (dataset.transform.inverse(each) for each in (rows, made))
    error = float((x - y).double().square().mean().sqrt())
    say(f"{dataset.description()}; root mean square error {error:.4g} over {len(rows)} test data")
    shape = dataset.image_shape
    if shape is None:
        draw = functools.partial(plots.reconstructions, x, {"reconstruction": y}, None)
    else:
        draw = functools.partial(galleries.pairs, x, y, shape)
    _write(target, y, draw)


def interpolate(arguments: argparse.Namespace) -> None:
    """``pvae interpolate``: paths between pairs of test data, through latent space."""
    _at_least("size", arguments.size, 1)
    run, dataset = _opened(arguments)
    if 2 * arguments.size > len(dataset.test):
        raise OptionError(
            f"--size {arguments.size} needs {2 * arguments.size} test data, {dataset.name} has "
            f"{len(dataset.test)}: ask for fewer paths"
        )
    import torch

    chosen = torch.randperm(
        len(dataset.test), generator=torch.Generator().manual_seed(arguments.seed)
    )
    start, end = dataset.test.x[chosen[: 2 * arguments.size]].chunk(2)
    target = _target(arguments, "figures/interpolations.png", ".png", ".npy")
    from pvae import galleries, latent_paths

    site = _observed(run, start)
    made = latent_paths.interpolate(
        run.model, run.guide, start, end, steps=arguments.steps, path=arguments.path,
        seed=arguments.seed,
    )[site]  # fmt: skip
    back = _original(dataset, made)
    _write(target, back, lambda: galleries.interpolations(back, dataset.image_shape))


def traverse(arguments: argparse.Namespace) -> None:
    """``pvae traverse``: a datum while each latent dimension moves over its prior."""
    run, dataset = _opened(arguments)
    if not 0 <= arguments.datum < len(dataset.test):
        raise OptionError(
            f"--datum must be between 0 and {len(dataset.test) - 1}, got {arguments.datum}"
        )
    rows = dataset.test.x[arguments.datum : arguments.datum + 1]
    target = _target(arguments, "figures/traversals.png", ".png", ".npy")
    from pvae import galleries, latent_paths

    site = _observed(run, rows)
    found = latent_paths.traverse(
        run.model, run.guide, rows, steps=arguments.steps, extent=arguments.extent,
        site=arguments.site, seed=arguments.seed,
    )  # fmt: skip
    back = _original(dataset, found.decoded[site])
    shown = found._replace(decoded={site: back})
    effect = (back - back.mean(1, keepdim=True)).double().square().mean((1, 2, 3)).sqrt()
    for k in effect.argsort(descending=True)[:5].tolist():
        name, index = found.dimensions[k]
        say(f"{name}[{index}] moves the datum by {float(effect[k]):.4g} (root mean square)")
    _write(target, back, lambda: galleries.traversals(shown, site, dataset.image_shape))


def out_of_distribution(arguments: argparse.Namespace) -> None:
    """``pvae ood``: scores of held-out data and of other data, and whether they tell them apart."""
    _at_least("num-particles", arguments.num_particles, 1)
    _at_least("num-data", arguments.num_data, 2)
    folder = Path(arguments.run)
    run, dataset = _opened(arguments)
    other = data_for(runs.read_config(folder), arguments.against)
    inside, outside = (each.test.x[: arguments.num_data] for each in (dataset, other))
    reference = dataset.valid.x[: arguments.num_data]
    from pvae import galleries
    from pvae import out_of_distribution as ood

    names = arguments.scores
    with threads(dataset), watched("scoring") as progress:
        found = ood.detect(
            run.model, run.guide, inside, outside, reference=reference, scores=names,
            num_particles=arguments.num_particles, seed=arguments.seed, progress=progress,
        )  # fmt: skip
    say(f"inside   {dataset.description()}; {len(inside)} test data")
    say(f"outside  {other.description()}; {len(outside)} test data")
    about: dict[str, Any] = {
        "inside": dataset.description(), "outside": other.description(), "seed": arguments.seed,
        "num_particles": arguments.num_particles, "scores": {},
    }  # fmt: skip
    for name, each in found.items():
        means = float(each.inside.mean()), float(each.outside.mean())
        say(
            f"{name:<10} AUROC {each.auroc.value:.3f} ± {each.auroc.stderr:.3f}   mean "
            f"{means[0]:.2f} inside, {means[1]:.2f} outside (nats, on the model's scale)"
        )
        about["scores"][name] = {
            "auroc": each.auroc.value, "stderr": each.auroc.stderr,
            "inside": each.inside.tolist(), "outside": each.outside.tolist(),
        }  # fmt: skip
    with runs.publish(folder) as aside:
        runs.write_json(aside / "ood.json", about)
        runs.save_figure(lambda: galleries.scores(found), aside / "figures" / "ood.png")
    say(f"wrote {folder}: ood.json, figures/ood.png")


# --- parts ---------------------------------------------------------------------------------------


def _opened(arguments: argparse.Namespace) -> tuple[Run, Dataset]:
    folder = Path(arguments.run)
    config = runs.read_config(folder)
    need_encoder(config, folder, f"pvae sample {folder} shows what it makes")
    return runs.load(folder), data_for(config, arguments.data)


def _observed(run: Run, rows: Tensor) -> str:
    """The observed site that is the data themselves."""
    from pvae.particles import inspect

    layout = inspect(run.model, run.guide, rows[:2])
    for name in layout.observed:
        if name in layout.entries:
            return str(name)
    raise ProgramError(
        "the model observes no site that is the data themselves, so nothing it makes is of their "
        "form"
    )


def _original(dataset: Dataset, made: Tensor) -> Tensor:
    """Data ``(..., D)`` on the original scale."""
    flat = made.reshape(-1, dataset.x_dim)
    return dataset.transform.inverse(flat).reshape(made.shape)


def _target(arguments: argparse.Namespace, default: str, *suffixes: str) -> Path:
    if arguments.out is None:
        return Path(arguments.run) / default
    target = Path(arguments.out)
    if target.suffix not in suffixes:
        raise OptionError(f"--out must end in {' or '.join(suffixes)}, got {str(target)!r}")
    return target


def _write(target: Path, values: Tensor, draw: Callable[[], Any]) -> None:
    """An array or a picture, by the name of the file."""
    import numpy as np

    from pvae import plots
    from pvae.checkpoints import write_aside

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npy":
        content = io.BytesIO()
        np.save(content, values.numpy())
        write_aside(target, content.getvalue())
    else:
        plots.save(draw(), target)
    say(f"wrote {target}")


def _write_arrays(target: Path, arrays: Mapping[str, Tensor]) -> str:
    """An ``.npz``, and the SHA-256 of its bytes."""
    import numpy as np

    from pvae.checkpoints import write_aside

    if any("/" in name for name in arrays):
        raise DataError(f"a latent site with a slash in its name cannot be written: {list(arrays)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    found: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    np.savez(content, **found)
    write_aside(target, content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise OptionError(f"--{option} must be at least {least}, got {value}")
