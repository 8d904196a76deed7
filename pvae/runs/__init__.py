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

A configuration is a plain dict. Nothing here is ever unpickled. In this package: ``files`` (YAML
and JSON) and ``folders``; ``configurations`` (``config.yaml``); ``datasets`` (what a model has to
know of them) and ``pairs``, built from both; ``loading``; ``generation`` and ``figures``.
"""

from pvae.runs.configurations import DEFAULTS, read_config, write_config
from pvae.runs.datasets import (
    batch_for,
    data_of,
    example_rows,
    facts,
    keep_labels,
    statistics,
    test_batch,
    training_data,
)
from pvae.runs.figures import draw_board_figures, draw_figures, save_figure
from pvae.runs.files import read_yaml, write_json, write_yaml
from pvae.runs.folders import begin, create, next_folder, publish
from pvae.runs.generation import generate, num_scored
from pvae.runs.loading import history, load
from pvae.runs.pairs import find, pair

__all__ = [
    "DEFAULTS",
    "batch_for",
    "begin",
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
    "num_scored",
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
