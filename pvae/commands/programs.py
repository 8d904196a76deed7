"""The programs that a configuration names, and what is settled about them before they are built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import catalogue, runs
from pvae.errors import OptionError, RunError

if TYPE_CHECKING:
    from pvae.data import Dataset

__all__ = ["Programs", "choose_likelihood", "has_encoder", "need_encoder"]

_LIKELIHOODS = {
    "binary": "bernoulli",
    "continuous": "gaussian",
    "integer": "discretized_logistic",
}


class Programs:
    """The model and the guide of a configuration, and the options that were given for each.

    Args:
        config: It names them.
        folder: A run folder, whose copy stands in for a user's file that is gone or changed.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self.model = runs.find("model", config["model"], folder)
        self.guide = runs.find("guide", config["guide"], folder)
        self.offered: dict[str, catalogue.Options | None] = {
            "model": _offered("model", self.model),
            "guide": _offered("guide", self.guide),
            "objective": catalogue.objective_options(config["objective"]),
            "game": None,
        }
        self.game: catalogue.Program | None = None
        if config.get("game") is not None:
            self.game = runs.find("game", config["game"], folder)
            hidden = ("model", "guide", "discriminator", *catalogue.filled_names)
            self.offered["game"] = catalogue.Options(self.game.factory, "game", hidden=hidden)

    def read(self, component: str, values: Mapping[str, Any], *, origin: str = "") -> Any:
        """The options given for a component, with their types."""
        offered = self.offered[component]
        if offered is not None:
            return offered.read(values, origin=origin)
        if values and component == "game":
            raise OptionError(
                f"--game.{next(iter(values))} is an option of a game, and none is played: name one "
                f"by --game, such as {', '.join(catalogue.games())}"
            )
        if values:
            raise OptionError(
                f"the {component} is a function, which has no options of its own: leave out "
                f"{', '.join(values)}"
            )
        return {}

    def takes(self, *names: str) -> bool:
        """Whether the model's or the guide's constructor has one of these parameters."""
        wanted = [
            name
            for program in (self.model, self.guide)
            if program.is_class
            for name in catalogue.option_names(program.factory)
        ]
        return not set(names).isdisjoint(wanted)


def _offered(role: str, program: catalogue.Program) -> catalogue.Options | None:
    if not program.is_class:
        return None
    return catalogue.Options(program.factory, role, hidden=catalogue.filled_names)


def choose_likelihood(config: dict[str, Any], programs: Programs, dataset: Dataset) -> str | None:
    """The likelihood that fits the data, where the model lets it be chosen and the user did not."""
    offered = programs.offered["model"]
    action = offered.actions.get("likelihood") if offered is not None else None
    if action is None or "likelihood" in config["model_options"]:
        return None
    if action.default not in (*_LIKELIHOODS.values(), None):
        return None
    likelihood = _LIKELIHOODS[dataset.kind]
    config["model_options"] = config["model_options"] | {"likelihood": likelihood}
    return likelihood


def has_encoder(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the guide of a run was trained, which a game may leave as it was made."""
    if config["game"] is None:
        return True
    game = runs.find("game", config["game"], folder)
    return "guide" in catalogue.option_names(game.factory)


def need_encoder(config: Mapping[str, Any], folder: Path, instead: str) -> None:
    """Refuse a run whose guide was not trained.

    Raises:
        RunError: It says what to do instead.
    """
    if not has_encoder(config, folder):
        game = str(config["game"]).rpartition(":")[2]
        raise RunError(f"{folder} was trained by the game {game}, which has no encoder: {instead}")
