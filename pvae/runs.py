"""Run folders: everything a trained pair needs to be used again, in one place.

::

    runs/vae-digits-1/
        config.yaml        what was run, every option resolved
        metrics.jsonl      one line per epoch
        checkpoints/best/  the parameters, with their SHA-256
        checkpoints/step-00000400/   all that an interrupted training needs to go on
        source/            a copy of the user's own model or guide file
        figures/*.png
        tensorboard/       from `pvae train --track tensorboard`
        evidence.nc, evidence.json, figures/evidence.png   from `pvae evaluate`

A configuration is a plain dict. Nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import catalogue
from pvae.errors import DataError, OptionError, ProgramError, PvaeError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.data import Dataset, Split
    from pvae.training import Run

__all__ = [
    "DEFAULTS",
    "begin",
    "batch_for",
    "create",
    "data_of",
    "draw_board_figures",
    "draw_figures",
    "example_rows",
    "facts",
    "find",
    "generate",
    "history",
    "keep_labels",
    "load",
    "next_folder",
    "pair",
    "publish",
    "read_config",
    "read_yaml",
    "save_figure",
    "statistics",
    "test_batch",
    "training_data",
    "write_config",
    "write_json",
    "write_yaml",
]

Config = dict[str, Any]

_EXAMPLE = 8  # rows of the data that a guide may be derived from

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


# --- the folder ----------------------------------------------------------------------------------


def next_folder(name: str, parent: str | Path = "runs") -> Path:
    """The first of ``runs/<name>-1``, ``runs/<name>-2``, … that does not exist."""
    number = 1
    while (Path(parent) / f"{name}-{number}").exists():
        number += 1
    return Path(parent) / f"{name}-{number}"


@contextlib.contextmanager
def create(path: str | Path) -> Iterator[Path]:
    """A new folder, built aside and renamed when the block ends; nothing is left if it fails.

    Args:
        path: The final place.

    Yields:
        The folder to write to.

    Raises:
        RunError: the place is taken, or cannot be written.
    """
    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise RunError(f"{final} exists already: choose another --run-dir, or remove it")
    made = [parent for parent in [final, *final.parents][1:] if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        _remove_empty(made)
        raise RunError(
            f"{final} cannot be written ({error.strerror}): choose another --run-dir"
        ) from None
    try:
        yield aside
        aside.chmod(0o755)
        aside.replace(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)
        raise


@contextlib.contextmanager
def begin(path: str | Path) -> Iterator[None]:
    """A new run folder, locked; removed if the block fails before there is a checkpoint to keep.

    Raises:
        RunError: The place is taken, or cannot be written.
    """
    from pvae.checkpoints import steps
    from pvae.locks import locked

    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise RunError(
            f"{final} exists already: choose another --run-dir, remove it, or go on with it by "
            "--resume"
        )
    made = [place for place in [final, *final.parents] if not place.exists()]
    try:
        final.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise RunError(
            f"{final} cannot be written ({error.strerror}): choose another --run-dir"
        ) from None
    with locked(final):
        try:
            yield
        except BaseException:
            if not steps(final / "checkpoints"):
                for child in final.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                _remove_empty(made)
            raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def publish(run_dir: Path) -> Iterator[Path]:
    """A folder aside whose files replace those of an existing run folder when the block ends."""
    aside = Path(tempfile.mkdtemp(prefix=".aside.", dir=run_dir))
    try:
        yield aside
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = run_dir / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# --- config.yaml ---------------------------------------------------------------------------------


def read_yaml(path: Path) -> Config:
    """A YAML mapping, strictly: a key given twice is refused, with its line.

    Raises:
        OptionError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError(f"the config file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(f"{path} is not a text file in UTF-8: give a YAML file") from None
    try:
        content = yaml.load(text, Loader=_loader(path.name))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path.name}{line} is not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path.name} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise OptionError(
            f"{path.name} must hold options as 'name: value' lines, got a {type(content).__name__}"
        )
    return content


def _loader(file: str) -> Any:
    """PyYAML's safe loader that refuses a key twice and reads ``1e-3`` as a number."""
    import re

    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
            seen: dict[Any, int] = {}
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise OptionError(f"{file}, line {line}: a key must be a word")
                if key in seen:
                    raise OptionError(
                        f"{file}, line {line}: {key!r} is there twice (first in line {seen[key]}): "
                        "keep one"
                    )
                seen[key] = line
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def write_config(folder: Path, config: Mapping[str, Any], *, sources: bool = True) -> None:
    """Write ``config.yaml``, and copies of the user's own files under ``source/``."""
    from pvae.checkpoints import write_aside

    for file in _user_files(config) if sources else []:
        (folder / "source").mkdir(exist_ok=True)
        write_aside(folder / "source" / file.name, file.read_bytes())
    write_yaml(folder / "config.yaml", config)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """A mapping as YAML, written whole or not at all."""
    import yaml  # type: ignore[import-untyped]

    from pvae.checkpoints import write_aside

    text = yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True)
    write_aside(path, text.encode())


def _user_files(config: Mapping[str, Any]) -> list[Path]:
    places = [str(config.get(role)).partition(":")[0] for role in ("model", "guide", "game")]
    return [Path(place) for place in dict.fromkeys(places) if place.endswith(".py")]


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts alone: what YAML and JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def read_config(run_dir: str | Path) -> Config:
    """The configuration of a run folder.

    Raises:
        RunError: the folder is missing, or is not one that ``pvae train`` wrote.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}: give one that pvae train wrote")
    if not (folder / "config.yaml").is_file():
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
    return config


# --- data and programs ---------------------------------------------------------------------------


def data_of(config: Config, *, streams: bool = False) -> Dataset:
    """The data set of a configuration; its split does not depend on the seed of the training.

    With ``streams``, the rows of a large file stay there.
    """
    from pvae.data import load as load_data

    return load_data(
        config["data"],
        binarize=config["binarize"],
        transform=config["transform"],
        size=config.get("data_size"),
        unreadable=config.get("data_unreadable", "stop"),
        streams=streams,
        seed=0,
    )


def facts(dataset: Dataset) -> dict[str, Any]:
    """What a model may have to know of its data, and a fingerprint of the test split."""
    return {
        "x_dim": dataset.x_dim,
        "num_levels": dataset.num_levels,
        "num_classes": _num_classes(dataset),
        "image_shape": None if dataset.image_shape is None else list(dataset.image_shape),
        "kind": dataset.kind,
        "fingerprint": _fingerprint(dataset.test),
    }


def _num_classes(dataset: Dataset) -> int | None:
    labels = [split.labels for split in (dataset.train, dataset.valid, dataset.test)]
    return max((int(part.max()) + 1 for part in labels if part is not None), default=None)


def batch_for(model: Any, x: Tensor, labels: Tensor | None) -> Any:
    """Data as a model takes them: ``x``, or ``(x, labels)`` where its program has a ``y``.

    Raises:
        DataError: the model needs labels, and the data have none.
    """
    if "y" not in inspect.signature(getattr(model, "forward", model)).parameters:
        return x
    if labels is None:
        raise DataError(
            f"{type(model).__name__} needs a label for each datum, and the data have none: put "
            "them into the .npz file as 'labels'"
        )
    return x, labels


def test_batch(model: Any, dataset: Dataset, count: int) -> Any:
    """The first test data, as the model takes them."""
    labels = dataset.test.labels
    return batch_for(model, dataset.test.x[:count], None if labels is None else labels[:count])


def training_data(config: Config, model: Any, dataset: Dataset) -> dict[str, Any]:
    """``train``, ``valid`` and ``preprocess`` as :func:`pvae.fit` takes them."""
    labels = dataset.train.labels
    if labels is not None:
        labels = keep_labels(labels, config["labels"])
    train, preprocess = batch_for(model, dataset.train_raw, labels), dataset.preprocess
    if train is not dataset.train_raw and preprocess is not None:
        preprocess = _of_first(preprocess)
    valid = batch_for(model, dataset.valid.x, dataset.valid.labels)
    return {"train": train, "valid": valid, "preprocess": preprocess}


def _of_first(preprocess: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same treatment of the first tensor of a batch."""
    return lambda batch: (preprocess(batch[0]), *batch[1:])


def keep_labels(labels: Tensor, count: int | None) -> Tensor:
    """Labels ``(N,)`` of which ``count`` are kept, evenly over the classes; the others are -1.

    Raises:
        OptionError: there are not that many.
    """
    import torch

    if count is None:
        return labels
    if not 0 <= count <= len(labels):
        raise OptionError(f"labels must be from 0 to the {len(labels)} training data, got {count}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # Each row's rank within its class: the first of every class, then the second of every class.
    ranks = torch.zeros_like(labels)
    for label in torch.unique(labels):  # type: ignore[no-untyped-call]
        rows = order[labels[order] == label]
        ranks[rows] = torch.arange(len(rows))
    kept = order[ranks[order].argsort(stable=True)[:count]]
    return torch.full_like(labels, -1).index_copy(0, kept, labels[kept])


def _fingerprint(split: Split) -> str:
    from pvae.data.mapped import MappedRows

    digest = hashlib.sha256()
    for block in split.x.blocks() if isinstance(split.x, MappedRows) else [split.x]:
        digest.update(block.contiguous().numpy().tobytes())
    digest.update(split.log_det.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def statistics(dataset: Dataset) -> dict[str, Tensor]:
    """``x_mean`` and ``x_scale`` of the training split, ``(D,)``; constant features get scale 1."""
    from pvae.data.mapped import MappedRows

    x: Any = dataset.train.x
    if isinstance(x, MappedRows):
        mean, scale = x.moments.mean.float(), x.moments.std.float()
    else:
        mean, scale = x.mean(0), x.std(0, correction=0)
    scale = scale.where(scale > 0, scale.new_ones(()))
    return {"x_mean": mean, "x_scale": scale}


def example_rows(dataset: Dataset) -> dict[str, Tensor]:
    """``example_batch`` and ``example_labels``: a few rows, for guides derived from a model."""
    found = {"example_batch": dataset.train.x[:_EXAMPLE].clone()}
    if dataset.train.labels is not None:
        found["example_labels"] = dataset.train.labels[:_EXAMPLE].clone()
    return found


def pair(config: Config, known: Mapping[str, Any], *, folder: Path | None = None) -> Any:
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
    copy = folder / "source" / place.name
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
            return _checked(source.name, source.factory(**{**filled, **options}))
    except PvaeError:
        raise
    except Exception as error:
        reason = catalogue.blame(error) or f"{type(error).__name__}: {_first_line(error)}"
        raise ProgramError(
            f"{source.name} cannot be built with these options ({reason})"
        ) from error


def _checked(name: str, program: Any) -> Any:
    """Refuse a size of zero, which torch takes."""
    for parameter, value in getattr(program, "named_parameters", list)():
        if value.numel() == 0:
            raise OptionError(
                f"{name} has an empty parameter {parameter!r} of shape {tuple(value.shape)}: give "
                "sizes of at least 1"
            )
    return program


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


# --- loading -------------------------------------------------------------------------------------


def load(run_dir: str | Path) -> Run:
    """The trained pair of a run folder, every byte of its parameters verified.

    Neither data nor a training step are needed. Of a run that was interrupted, or whose best
    parameters are damaged, the newest good checkpoint is taken, with a warning.

    Raises:
        RunError: the folder is no run, or a file in it is missing or damaged.
        ProgramError: the user's model file does not run.
    """
    from pvae.checkpoints import load_tensors
    from pvae.training import Run

    folder = Path(run_dir)
    config = read_config(folder)
    known = dict(config["data_facts"])
    if (folder / "checkpoints" / "data").is_dir():
        known |= load_tensors(folder / "checkpoints" / "data")[0]
    tensors, about = _best(folder)
    model, guide = pair(config, known, folder=folder)
    _restore(model, guide, tensors, known["x_dim"], folder)
    rows = history(folder, torn=about["stopped"] == "interrupted")
    by_length = "epochs" if len(rows) == config["epochs"] else "patience"
    return Run(
        model=model,
        guide=guide,
        objective=catalogue.build_objective(config["objective"], config["objective_options"]),
        history=rows,
        best_epoch=int(about["epoch"]),
        num_parameters=int(config.get("num_parameters") or 0),
        seconds=sum(row.get("seconds", 0.0) for row in rows),
        run_dir=folder,
        stopped=about["stopped"] or by_length,
    )


def _best(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best parameters of a run, with their epoch and why it stopped."""
    from pvae.checkpoints import load_tensors, newest, steps

    root = folder / "checkpoints"
    try:
        tensors, manifest = load_tensors(root / "best")
        later = [path for path in steps(root) if int(path.name[5:13]) > manifest.get("step", 0)]
        if not later or manifest.get("step") is None:
            return tensors, {"epoch": manifest.get("epoch", 0), "stopped": manifest.get("stopped")}
        damage = None
    except RunError as error:
        damage = error if (root / "best").exists() else None
        if not steps(root):
            raise
    found = newest(root)
    assert found is not None
    where, (tensors, manifest) = found
    place = manifest.get("place")
    if not (isinstance(place, dict) and {"epoch", "best_epoch"} <= place.keys()):
        raise RunError(f"{where} is no checkpoint of a training")
    reason = damage or f"{folder} was interrupted in epoch {place['epoch']}"
    warnings.warn(f"{reason}; the best parameters of {where.name} are used", stacklevel=3)
    kind = "best." if any(name.startswith("best.") for name in tensors) else "state."
    kept = {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
    stopped = None if damage else "interrupted"
    return kept, {"epoch": place["best_epoch"], "stopped": stopped}


def _restore(
    model: Any, guide: Any, tensors: Mapping[str, Tensor], x_dim: int, folder: Path
) -> None:
    """Copy the saved tensors into the pair, each by its name."""
    import torch

    from pvae.particles import named_tensors, parameters

    own = named_tensors(model, guide)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("objective.", "game."))}
    if any(name.startswith("store.") for name in tensors):
        own |= parameters(model, guide, torch.zeros(2, x_dim))
    for name in sorted(own.keys() ^ tensors.keys()):
        what = "is not in" if name in own else "has no place in the pair of"
        raise RunError(f"tensor {name!r} {what} {folder}: was the model's file changed?")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise RunError(
                    f"tensor {name!r} of {folder} has shape {tuple(tensors[name].shape)}, the "
                    f"model expects {tuple(tensor.shape)}: was its file changed?"
                )
            tensor.copy_(tensors[name])


def history(folder: Path, *, torn: bool = False) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``.

    Args:
        folder: The run.
        torn: The file may lack, or may not have ended its last line.

    Raises:
        RunError: It is missing or damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text()
        if torn:
            text = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        if torn and isinstance(error, FileNotFoundError):
            return []
        raise RunError(f"{path} is missing or damaged: train the run again") from None


# --- drawing from a trained pair -----------------------------------------------------------------


def generate(
    model: Any, example: Any, *, guide: Any = None, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Draw data from a model, or, with a guide, reconstruct the example through its latents.

    Any program will do: the observed site is drawn instead of scored.

    Args:
        model: The generative program.
        example: ``(B, D)``, or a tuple that begins with it; only its shape matters without a guide.
        guide: Draws the latent sites given the example, instead of the model's prior.
        seed: Seed of the draws; the caller's random stream is untouched.

    Returns:
        Draws ``(B, D)``; the means of ``p(x | z)``, if it has any; the guide's posterior means of
        all real latent sites, flattened to ``(B, L)``.

    Raises:
        ProgramError: no observed site has the shape of the example.
    """
    from pyro import poutine

    from pvae.evidence.importance import evaluation
    from pvae.particles import arguments, module_of

    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    device = next((p.device for m in modules for p in m.parameters()), None)
    args = tuple(part.to(device) for part in arguments(example)[0])
    example = args[0]
    with evaluation(model, guide, seed=seed, device=example.device), poutine.block():
        program, latent = poutine.uncondition(model), None
        if guide is not None:
            guide_trace = poutine.trace(guide).get_trace(*args)
            program = poutine.replay(program, trace=guide_trace)
            latent = _latent_means(guide_trace, len(example))
        trace = poutine.trace(program).get_trace(*args)
    for node in trace.nodes.values():
        observed = node["type"] == "sample" and node["infer"].get("was_observed")
        if observed and node["value"].shape == example.shape:
            return node["value"].cpu(), _mean(node["fn"], example.shape), latent
    raise ProgramError("the model observes no site of the shape of its data, so it cannot sample")


def _mean(distribution: Any, shape: Any) -> Tensor | None:
    try:
        mean: Tensor = distribution.mean
    except (NotImplementedError, AttributeError):
        return None
    return mean.cpu() if mean.shape == shape else None


def _latent_means(trace: Any, rows: int) -> Tensor | None:
    import torch

    columns = []
    for node in trace.nodes.values():
        if node["type"] != "sample" or not node["value"].is_floating_point():
            continue
        if node["value"].shape[:1] == (rows,):
            mean = _mean(node["fn"], node["value"].shape)
            columns.append((node["value"].cpu() if mean is None else mean).reshape(rows, -1))
    return torch.cat(columns, 1) if columns else None


def draw_figures(run: Run, dataset: Dataset, folder: Path, *, name: str) -> None:
    """Training curves, samples beside data, reconstructions, and latents by label, as PNGs."""
    draw_board_figures({name: run}, {}, dataset, folder)


def draw_board_figures(
    networks: Mapping[str, Run], classical: Mapping[str, Any], dataset: Dataset, folder: Path
) -> None:
    """The same of several runs, best first, beside samples of the best classical density.

    A picture that cannot be drawn is a warning, never the loss of a trained run.
    """
    from pvae import plots

    best = next(iter(networks.values()))
    pictures: dict[str, Callable[[], Any]] = {
        "training_curves": lambda: plots.training_curves(
            {name: run.history for name, run in networks.items()}
        ),
        "samples": lambda: _samples(networks, classical, dataset),
        "reconstructions": lambda: _reconstructions(networks, dataset),
    }
    if any(getattr(density, "selection", None) for density in classical.values()):
        pictures["selection"] = lambda: plots.selection_curves(classical)
    if dataset.test.labels is not None:
        pictures["latents"] = lambda: _latent_scatter(best, dataset)
    for title, make in pictures.items():
        save_figure(make, folder / "figures" / f"{title}.png")


def save_figure(make: Callable[[], Any], path: Path) -> Path | None:
    """Draw and write one picture; ``None`` and a warning if it cannot be drawn."""
    from pvae import plots

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        plots.save(make(), path)
    except OSError:
        raise
    except Exception as error:
        warnings.warn(
            f"the picture {path.name} was not drawn ({type(error).__name__}: {_first_line(error)})",
            UserWarning,
            stacklevel=2,
        )
        return None
    return path


def _samples(networks: Mapping[str, Run], classical: Mapping[str, Any], dataset: Dataset) -> Any:
    """Draws of the best run with their means, and of the best classical density."""
    from pvae import plots

    rows, back = dataset.test.x[:64], dataset.transform.inverse
    name, run = next(iter(networks.items()))
    draws, means, _ = generate(run.model, test_batch(run.model, dataset, 64))
    shown = {f"{name}: samples": back(draws)}
    if means is not None:
        shown[f"{name}: means"] = back(means)
    for rival, density in list(classical.items())[:1]:
        shown[rival] = back(density.sample(len(rows)).to(rows.dtype))
    return plots.samples_beside_data(shown, back(rows), dataset.image_shape)


def _reconstructions(networks: Mapping[str, Run], dataset: Dataset) -> Any:
    from pvae import plots

    rows, back, shown = dataset.test.x[:16], dataset.transform.inverse, {}
    for name, run in networks.items():
        example = test_batch(run.model, dataset, 16)
        draws, means, _ = generate(run.model, example, guide=run.guide)
        shown[name] = back(draws if means is None else means)
    return plots.reconstructions(back(rows), shown, dataset.image_shape)


def _latent_scatter(run: Run, dataset: Dataset) -> Any:
    from pvae import plots

    example = test_batch(run.model, dataset, len(dataset.test))
    _, _, latent = generate(run.model, example, guide=run.guide)
    if latent is None:
        raise DataError("the guide has no real latent site")
    return plots.latent_scatter(latent, dataset.test.labels)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Strict JSON, written whole or not at all; what is not finite is ``null``."""
    from pvae.checkpoints import write_aside

    text = json.dumps(_strict(_plain(content)), indent=2, ensure_ascii=False, allow_nan=False)
    write_aside(path, (text + "\n").encode())


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
