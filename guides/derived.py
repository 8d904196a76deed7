"""An amortised guide derived from the model itself: the faithful inverse of its own traces.

    q(z | x) = prod_i q(z_i | x, latents that the posterior of z_i depends on)

What each latent depends on is found by inverting the model's graph (Webb et al. 2018, see
:mod:`pvae.inversion`); encoders follow the shape of the data, heads the supports of the sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.assembly import Assembly, Recipe, assemble
from pvae.contexts import aligned, flattened, joined, summarised
from pvae.errors import OptionError, ProgramError
from pvae.placement import Plate, Where
from pvae.structure import Structure

__all__ = ["Auto"]


class Auto(nn.Module):
    """A guide for any model, without a line of guide code.

    ``explain()`` says what was derived and why, ``source()`` prints it as a program of its own.

    Args:
        model: The generative program; it is read, not kept.
        example_batch: A few rows of training data to read it on: a tensor, a tuple or a dict. Its
            mean and scale standardise the encoders' input if ``x_mean`` and ``x_scale`` are
            not given.
        also: Batches of other forms that the model takes: with labels, say, where
            ``example_batch`` has none. Sites whose values they give are taken from them.
        family: ``"diagonal"``, ``"full"``, ``"low_rank"`` (Gaussians in unconstrained space) or
            ``"flow"`` (neural spline flow), for all continuous sites or as ``{site: family}``.
        encoder: ``"vector"``, ``"image"``, ``"sequence"`` or ``"set"`` where the shape of the data
            says too little.
        hidden: Width of each layer of the encoders; empty for a guide that is linear in the data.
        activation: Their non-linearity.
        rank: Rank of a low-rank covariance.
        x_mean: Mean of the data, ``(x_dim,)``.
        x_scale: Standard deviation of the data, ``(x_dim,)``.
        image_shape: Shape of the pictures that come flat, for ``encoder="image"``.

    Raises:
        ProgramError: A site cannot be inferred so; the message names it and the remedy.
        OptionError: There is no such family, encoder or site.
    """

    def __init__(
        self,
        model: Any,
        example_batch: Any,
        *,
        also: Sequence[Any] = (),
        family: str | Mapping[str, str] = "diagonal",
        encoder: str | None = None,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        rank: int = 4,
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise OptionError(f"rank must be at least 1, got {rank}")
        found: Assembly = assemble(
            model, example_batch, also=also, family=family, encoder=encoder, hidden=hidden,
            activation=activation, rank=rank, moments=(x_mean, x_scale), image_shape=image_shape,
        )  # fmt: skip
        self.structure: Structure = found.structure
        self.recipes: list[Recipe] = found.recipes
        self.forms: dict[frozenset[Any], dict[str, Where]] = found.forms
        self.encoders = nn.ModuleDict(found.encoders)
        self.heads = nn.ModuleDict(found.heads)
        self.calls, self.names, self.notes = found.calls, found.names, found.notes
        self.picks_rows, self.dtype = found.picks_rows, found.dtype
        self.to(found.device, found.dtype)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {name: site.event_shape for name, site in self.structure.latents.items()}

    def forward(self, *batch: Any, **named: Any) -> dict[str, Tensor]:
        """Sample every latent site given the batch, which has the form of an example."""
        tensors, given = self._read(batch, named)
        plates = {p.name: self._plate(p, tensors) for p in self._plates()}
        rows = self.structure.plates[self.structure.data]
        if self.picks_rows:
            indices = plates[rows.name].indices
            tensors = {key: tensor[indices] for key, tensor in tensors.items()}
        values = {name: self._observed(where, tensors) for name, where in given.items()}
        features = {
            key: self._features(key, tensors)
            for key, name in self.names.items()
            if name in self.encoders
        }
        for recipe in self.recipes:
            if recipe.site.name not in values:
                values[recipe.site.name] = self._sample(recipe, features, values, plates, tensors)
        return values

    def _features(self, key: Any, tensors: Mapping[Any, Tensor]) -> Tensor:
        features: Tensor = self.encoders[self.names[key]](tensors[key])
        where = self.structure.entries[key].mask
        if where is None:
            return features
        mask = self._given(where, tensors)
        return features * mask.reshape(len(mask), *(1,) * (features.dim() - 1))

    def _sample(
        self,
        recipe: Recipe,
        features: Mapping[Any, Tensor],
        values: Mapping[str, Tensor],
        plates: Mapping[str, Any],
        tensors: Mapping[Any, Tensor],
    ) -> Tensor:
        site = recipe.site
        posterior = self.heads[recipe.head](self._context(recipe, features, values))
        if site.mask is not None:
            posterior = posterior.mask(self._mask(site.mask, tensors))
        infer = {"enumerate": site.enumerate} if site.enumerate else {}
        inside = [plates[name] for name in site.plates]
        for plate in inside:
            plate.__enter__()
        try:
            value: Tensor = pyro.sample(site.name, posterior, infer=infer)
        finally:
            for plate in reversed(inside):
                plate.__exit__(None, None, None)
        return value

    def _context(
        self, recipe: Recipe, features: Mapping[Any, Tensor], values: Mapping[str, Tensor]
    ) -> Tensor | None:
        parts: list[Tensor] = []
        head: Any = self.heads[recipe.head]
        for piece in recipe.pieces:
            if piece.kind == "entry":
                part = features[piece.key]
                part = part[:, piece.step] if piece.step is not None else part
                part = part.mean(piece.over) if piece.over else part
                parts.append(aligned(part, piece.dims))
                continue
            if piece.kind == "absent":
                parts.append(head.trunk.linear.weight.new_zeros(piece.size))
                continue
            given: Any = self.heads[piece.head]
            part = getattr(given, "space", given).features(values[piece.key])
            part = flattened(part, piece.depth) if piece.depth else part
            parts.append(summarised(part, piece.over) if piece.over else part)
            if piece.flagged:
                parts.append(head.trunk.linear.weight.new_ones(1))
        return joined(*parts, depth=recipe.depth) if parts else None

    # --- the batch ---------------------------------------------------------------------------

    def _read(
        self, batch: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[dict[Any, Tensor], dict[str, Where]]:
        """The tensors of a call, and the sites whose values are among them."""
        known = frozenset().union(*self.forms)
        tensors = {
            key: value
            for key, value in [*enumerate(batch), *named.items()]
            if key in known and isinstance(value, Tensor)
        }
        form = frozenset(tensors)
        if form not in self.forms:
            forms = " or ".join(str(sorted(map(str, form))) for form in self.forms)
            raise ProgramError(
                f"the guide is called with tensors {sorted(map(str, form))} and was derived for "
                f"{forms}: call it as the example was, or pass such a batch in also="
            )
        for key, entry in self.structure.entries.items():
            fixed = [a for a in range(len(entry.shape)) if not self._is_free(key, a)]
            shape = tensors[key].shape[1:]
            if len(shape) != len(entry.shape) or any(shape[a] != entry.shape[a] for a in fixed):
                raise ProgramError(
                    f"the guide was derived for data of shape {entry.shape}, got {tuple(shape)} "
                    f"(tensor {key!r} of the batch): derive it anew from such a batch"
                )
        return tensors, self.forms[form]

    def _is_free(self, key: Any, axis: int) -> bool:
        entry = self.structure.entries[key]
        plate = entry.plates.get(axis)
        return plate is not None and self.structure.plates[plate].axis is not None

    def _observed(self, where: Where, tensors: Mapping[Any, Tensor]) -> Tensor:
        value = tensors[where.entry]
        return value if where.step is None else value[:, where.step]

    def _given(self, where: Where, tensors: Mapping[Any, Tensor]) -> Tensor:
        mask = self._observed(where, tensors).bool()
        return ~mask if where.negated else mask

    def _mask(self, where: Where, tensors: Mapping[Any, Tensor]) -> Tensor:
        mask = self._given(where, tensors)
        depth = -self.structure.plates[self.structure.data].dim - 1
        return mask.reshape(*mask.shape, *(1,) * depth)

    def _plates(self) -> list[Plate]:
        used = {name for site in self.structure.latents.values() for name in site.plates}
        return [p for p in self.structure.plates.values() if p.name in used]

    def _plate(self, plate: Plate, tensors: Mapping[Any, Tensor]) -> Any:
        size = plate.size
        if plate.axis is not None:
            key, axis = plate.axis
            size = tensors[key].shape[axis]
        if plate.total is None:
            return pyro.plate(plate.name, size, dim=plate.dim)
        if self.picks_rows:
            return pyro.plate(plate.name, plate.total, subsample_size=plate.size, dim=plate.dim)
        rows = torch.arange(size, device=next(iter(tensors.values())).device)
        return pyro.plate(plate.name, plate.total, subsample=rows, dim=plate.dim)

    # --- in words ----------------------------------------------------------------------------

    def explain(self) -> str:
        """What was derived and why, a paragraph for each site."""
        from pvae.explanation import explanation

        return explanation(self)

    def source(self) -> str:
        """The same guide as Python source that stands alone, with the same parameters' names."""
        from pvae.guide_source import source

        return source(self)
