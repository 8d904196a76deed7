"""A derived guide as Python source of its own: what a user takes over when the derivation ends.

The source imports torch, Pyro (and zuko, for a flow) and nothing else. Its parameters have the
names that the derived guide's have, so that one's ``state_dict`` is the other's.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions
import torch

from pvae import contexts, encoders, heads, networks, spaces

__all__ = ["Call", "source"]

_HEADER = '''"""{title}

{factorisation}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as bijections
from torch.nn.functional import softplus


def activation_module(name: str) -> nn.Module:
    """The activation called ``name``."""
    return {{{activations}}}[name]()
'''


@dataclass(frozen=True)
class Call:
    """A constructor with its arguments: it can be called, and written down."""

    what: Any
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Call it, arguments that are calls first."""
        args = [a.build() if isinstance(a, Call) else a for a in self.args]
        return self.what(*args, **self.options)

    def __str__(self) -> str:
        args = [str(a) if isinstance(a, Call) else _literal(a) for a in self.args]
        options = [f"{name}={_literal(value)}" for name, value in self.options.items()]
        return f"{self.what.__name__}({', '.join([*args, *options])})"


def _literal(value: Any) -> str:
    if isinstance(value, torch.distributions.constraints.Constraint):
        return _constraint(value)
    return repr(tuple(value)) if isinstance(value, (list, torch.Size)) else repr(value)


def _constraint(value: Any) -> str:
    """``constraints.independent(constraints.real, 1)``, say."""
    if isinstance(value, torch.distributions.constraints.independent):
        inner = _constraint(value.base_constraint)
        return f"constraints.independent({inner}, {value.reinterpreted_batch_ndims})"
    modules = {
        "constraints": torch.distributions.constraints,
        "dist.constraints": pyro.distributions.constraints,
    }
    for prefix, module in modules.items():
        for name, known in vars(module).items():
            if known is value and not name.startswith("_"):
                return f"{prefix}.{name}"
    for prefix, module in modules.items():
        for name, known in vars(module).items():
            if known is type(value) and not name.startswith("_"):
                keys = [key for key in ("lower_bound", "upper_bound") if hasattr(value, key)]
                bounds = [f"{key}={getattr(value, key)!r}" for key in keys]
                return f"{prefix}.{name}({', '.join(bounds)})"
    return repr(value)


def source(guide: Any) -> str:
    """The source of a derived guide, see :meth:`pvae.guides.derived.Auto.source`."""
    program = _Program(guide)
    body = program.text()
    activations = {name: cls.__name__ for name, cls in networks.ACTIVATIONS.items()}
    used = [f'"{name}": nn.{cls}' for name, cls in activations.items() if f"{name!r}" in body]
    header = _HEADER.format(
        title="A guide, derived from its model.",
        factorisation="\n".join(f"    {line}" for line in program.factorisation()),
        activations=", ".join(used or ['"silu": nn.SiLU']),
    )
    return "\n\n".join([header.rstrip(), *_inlined(body), body]) + "\n"


def _inlined(body: str) -> list[str]:
    """Source of the classes and functions that a text uses, and of those that they use."""
    known = {
        name: value
        for module in (networks, encoders, spaces, heads, contexts)
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and name != "activation_module"
    }
    texts = {name: inspect.getsource(value) for name, value in known.items()}
    wanted: list[str] = []
    waiting = [body]
    while waiting:
        text = waiting.pop()
        for name in known:
            if name not in wanted and re.search(rf"\b{name}\(", text):
                wanted.append(name)
                waiting.append(texts[name])
    return ["\n" + texts[name].rstrip() for name in known if name in wanted]


class _Program:
    """The class ``Guide`` of the source."""

    def __init__(self, guide: Any) -> None:
        self.guide, self.structure = guide, guide.structure
        keys = {key for form in guide.forms for key in form}
        self.inputs = {key: f"input_{key}" if isinstance(key, int) else str(key) for key in keys}
        taken = {*self.inputs.values(), *dir(builtins), "self", "pyro", "torch", "dist", "math"}
        self.variables: dict[str, str] = {}
        for name in self.structure.latents:
            self.variables[name] = _identifier(name, {*taken, *self.variables.values()})

    def factorisation(self) -> list[str]:
        """``q(z | x)`` for each site."""
        lines = []
        for recipe in self.guide.recipes:
            given = [self.inputs[key] for key in recipe.factor.entries]
            given += [name for name in recipe.factor.given if name is not None]
            lines.append(f"q({recipe.site.name} | {', '.join(given)})" if given
                         else f"q({recipe.site.name})")  # fmt: skip
        return lines

    def text(self) -> str:
        """The class."""
        lines = ["", "class Guide(nn.Module):", '    """The guide."""', ""]
        lines += ["    def __init__(self) -> None:", "        super().__init__()"]
        for kind in ("encoders", "heads"):
            lines.append(f"        self.{kind} = nn.ModuleDict()")
            for name, call in self.guide.calls[kind].items():
                lines.append(f"        self.{kind}[{name!r}] = {call}")
        lines.append(f"        self.to({self.guide.dtype})")
        lines += ["", f"    def forward(self, {self._signature()}) -> None:"]
        lines.append('        """Sample every latent site."""')
        lines += [f"        {line}" for line in self._forward()]
        return "\n".join(lines)

    def _signature(self) -> str:
        always = frozenset.intersection(*self.guide.forms)
        numbered = {k: n for k, n in self.inputs.items() if isinstance(k, int)}
        parameters = []
        optional = False
        for index in range(max(numbered, default=-1) + 1):
            optional = optional or index not in always
            name = numbered.get(index, f"unused_{index}")
            parameters.append(f"{name}: Any = None" if optional else f"{name}: Any")
        parameters.append("*unused: Any")
        for key in sorted((k for k in self.inputs if not isinstance(k, int)), key=str):
            parameters.append(f"{key}: Any" if key in always else f"{key}: Any = None")
        return ", ".join([*parameters, "**also_unused: Any"])

    def _forward(self) -> list[str]:
        lines = [f"{self._plate_name(p)} = {self._plate(p)}" for p in self.guide._plates()]
        data = self.structure.plates[self.structure.data]
        first = self.inputs[next(iter(self.structure.entries))]
        if data.total is not None and self.guide.picks_rows:
            rows = f"{self._plate_name(data)}.indices"
            lines += [f"{n} = None if {n} is None else {n}[{rows}]" for n in self.inputs.values()]
        elif data.total is None:
            lines.insert(0, f"# {first} has a row for each datum")
        for key in self.structure.entries:
            name = f"input_{key}" if isinstance(key, int) else str(key)
            module = self.guide.names[key]
            if module in self.guide.calls["encoders"]:
                lines.append(f"features_{name} = self.encoders[{module!r}]({self.inputs[key]})")
                if (mask := self.structure.entries[key].mask) is not None:
                    shape = f"(-1,) + (1,) * (features_{name}.dim() - 1)"
                    lines.append(
                        f"features_{name} = features_{name} * {self._mask(mask)}.reshape({shape})"
                    )
        for recipe in self.guide.recipes:
            lines += self._statement(recipe)
        return lines

    def _plate_name(self, plate: Any) -> str:
        return "plate_" + re.sub(r"\W", "_", plate.name)

    def _plate(self, plate: Any) -> str:
        size = str(plate.size)
        if plate.axis is not None:
            key, axis = plate.axis
            size = f"{self.inputs[key]}.shape[{axis}]"
        if plate.total is None:
            return f"pyro.plate({plate.name!r}, {size}, dim={plate.dim})"
        taken = f"subsample_size={plate.size}"
        if not self.guide.picks_rows:
            taken = f"subsample=torch.arange({size})"
        return f"pyro.plate({plate.name!r}, {plate.total}, {taken}, dim={plate.dim})"

    def _statement(self, recipe: Any) -> list[str]:
        site, parts = recipe.site, [t for p in recipe.pieces for t in self._piece(recipe, p)]
        context = f"joined({', '.join(parts)}, depth={recipe.depth})" if parts else "None"
        posterior = f"self.heads[{recipe.head!r}]({context})"
        if site.mask is not None:
            depth = "[..., None]" * (-self.structure.plates[self.structure.data].dim - 1)
            posterior += f".mask({self._mask(site.mask)}{depth})"
        infer = f", infer={{'enumerate': {site.enumerate!r}}}" if site.enumerate else ""
        variable = self.variables[site.name]
        lines = [f"{variable} = pyro.sample({site.name!r}, {posterior}{infer})"]
        if site.plates:
            inside = [self.structure.plates[name] for name in site.plates]
            plates = ", ".join(map(self._plate_name, inside))
            lines = [f"with {plates}:", f"    {lines[0]}"]
        for given in self.guide.forms.values():
            if site.name in given:
                where = given[site.name]
                lines = [f"if {self.inputs[where.entry]} is None:", *[f"    {s}" for s in lines],
                         "else:", f"    {variable} = {self._where(where)}"]  # fmt: skip
                break
        return lines

    def _mask(self, where: Any) -> str:
        return f"({'~' if where.negated else ''}{self._where(where)}.bool())"

    def _where(self, where: Any) -> str:
        name = self.inputs[where.entry]
        return name if where.step is None else f"{name}[:, {where.step}]"

    def _piece(self, recipe: Any, piece: Any) -> list[str]:
        weight = f"self.heads[{recipe.head!r}].trunk.linear.weight"
        if piece.kind == "absent":
            return [f"{weight}.new_zeros({piece.size})"]
        if piece.kind == "entry":
            text = f"features_{self.inputs[piece.key]}"
            text += f"[:, {piece.step}]" if piece.step is not None else ""
            text += f".mean({piece.over})" if piece.over else ""
            return [f"aligned({text}, {piece.dims})"]
        space = ".space" if hasattr(self.guide.heads[piece.head], "space") else ""
        text = f"self.heads[{piece.head!r}]{space}.features({self.variables[piece.key]})"
        text = f"flattened({text}, {piece.depth})" if piece.depth else text
        text = f"summarised({text}, {piece.over})" if piece.over else text
        return [text, f"{weight}.new_ones(1)"] if piece.flagged else [text]


def _identifier(name: str, taken: set[str]) -> str:
    safe = re.sub(r"\W", "_", name)
    safe = f"site_{safe}" if safe[:1].isdigit() or keyword.iskeyword(safe) else safe
    while safe in taken:
        safe += "_"
    return safe
