"""``pvae list``: what can be named on a command line."""

from __future__ import annotations

import argparse

from pvae import catalogue
from pvae.commands.saying import say

__all__ = ["list_names"]


def list_names(_: argparse.Namespace) -> None:
    """``pvae list``: what can be named on a command line, with a line on each."""
    import inspect

    from pvae import baselines
    from pvae.data import sources

    recipes = {
        name: (inspect.getdoc(recipe) or "").partition("\n")[0]
        for name, recipe in catalogue.objectives().items()
    }
    sections = {
        "models": catalogue.listing("model"),
        "guides": catalogue.listing("guide"),
        "objectives": recipes,
        "games": catalogue.listing("game"),
        "data sets": sources(),
        "baselines": baselines.available(),
        "optimizers": catalogue.optimizers(),
    }
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        say(f"{title}:")
        for name, line in section.items():
            say(f"  {name:<{width}}  {line.replace('``', '')}".rstrip())
