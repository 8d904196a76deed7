"""The doctor: what goes wrong in a training, named, with the figures that show it and a remedy.

``examine_data``, ``examine_history`` and ``examine_pair`` are functions of what is there already;
:class:`Doctor` is a tracker that asks them while the training runs, once an epoch. Nothing is
added to a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pvae.data import as_batch, num_rows, take
from pvae.data.mapped import MappedRows
from pvae.errors import PvaeError
from pvae.evidence import importance, information
from pvae.evidence.importance import evaluation
from pvae.evidence.sweep import tensors_of
from pvae.particles import by_datum, inspect, log_joint, module_of, sample_guide

if TYPE_CHECKING:
    from pvae.training import Run

__all__ = ["Doctor", "Finding", "examine_data", "examine_history", "examine_pair", "report"]

History = Sequence[Mapping[str, float]]

_COLLAPSED = 0.1  # nats of KL below which the latents say nothing
_IGNORED = 0.1  # nats that exchanging the latents between data costs a decoder that reads them
_DEAD = 0.25  # share of a layer's units that never vary
_UNRELIABLE = 0.7  # k-hat above which importance sampling is not to be trusted
_WEIGHT = "the KL weight does not end at 1"
_ROLLED_BACK = "the training was rolled back"
_CONFIRMED = 3  # epochs that a trend has to last


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        name: What it is, in a few words, always the same for the same thing.
        evidence: The figures that show it.
        remedy: What to try.
    """

    name: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}; {self.remedy}"


# --- data ----------------------------------------------------------------------------------------


def examine_data(x: Tensor | MappedRows) -> list[Finding]:
    """Rows ``(N, D)``: values that are not finite, columns that never vary, scales far apart."""
    if isinstance(x, MappedRows):  # a row that is not finite was refused when it was read
        return _still(x.moments.low == x.moments.high)
    if not x.is_floating_point() or x.dim() < 2:
        return []
    flat = x.flatten(1)
    bad = ~torch.isfinite(flat)
    found = []
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        kind = "NaN" if bool(flat[row, column].isnan()) else "infinite"
        found.append(
            Finding(
                "values that are not finite",
                f"{int(bad.any(1).sum())} rows, the first {kind} in row {row}, column {column}",
                "drop or mend these rows, or take a model that allows missing cells (tabular)",
            )
        )
        return found
    return _still((flat == flat[0]).all(0))


def _still(columns: Tensor) -> list[Finding]:
    still = columns.nonzero().flatten().tolist()
    if not still:
        return []
    return [
        Finding(
            "columns that never vary",
            f"{len(still)} of {len(columns)}, the first number {still[0]}",
            "leave them out: a density there tells of its floor alone",
        )
    ]


# --- history -------------------------------------------------------------------------------------


def examine_history(
    history: History, *, finished: bool = True, objective: Any = None
) -> list[Finding]:
    """What the figures of the epochs tell; ``finished`` where no epoch follows.

    Judged are the ELBO at KL weight one, on training and held-out data, the KL and its weight.
    """
    if not history:
        return []
    found = [*_rolled_back(history), *_diverging(history), *_over_fitting(history)]
    if finished and not getattr(getattr(objective, "kl_term", None), "steers", False):
        found += _weight(history)
    if finished:
        found += _collapse(history)
    return found


def _weight(history: History) -> Iterator[Finding]:
    final = history[-1].get("beta", 1.0)
    if abs(final - 1) > 1e-6:
        yield Finding(
            _WEIGHT,
            f"it is {final:g} after {len(history)} epochs",
            "let its schedule end earlier or train longer; 'bound' is no bound on log p(x) so, "
            "'elbo' is",
        )


def _collapse(history: History) -> Iterator[Finding]:
    last = history[-1]
    kl = last.get("valid_kl", last.get("kl", math.nan))
    if kl < _COLLAPSED:
        yield Finding(
            "posterior collapse",
            f"the KL of all latents is {kl:.3f} nats, so q(z|x) is the prior whatever x is",
            "let the KL weight rise from 0 (beta='Linear(1000)'), give free bits, take more "
            "particles (iwae) or a weaker decoder",
        )


def _rolled_back(history: History) -> Iterator[Finding]:
    rows = [row for row in history if row.get("rolled_back")]
    if rows:
        yield Finding(
            _ROLLED_BACK,
            f"a loss or gradient was not finite {sum(row['rolled_back'] for row in rows):.0f} "
            f"times in {len(rows)} epochs, the first number {rows[0]['epoch']:.0f}",
            "the warning of that moment names site, data rows or parameter: look at these data, "
            "lower lr or clip the gradient (clip_norm)",
        )


def _diverging(history: History) -> Iterator[Finding]:
    """The training ELBO is far below its best of before, and stays there; or never got anywhere."""
    elbo = [row["elbo"] for row in history if "elbo" in row]
    if len(elbo) < _CONFIRMED + 2:
        return
    best = max(elbo[:-_CONFIRMED])
    gained = best - elbo[0]
    fall = best - max(elbo[-_CONFIRMED:])
    if fall > max(5.0, 0.25 * abs(best), gained):
        yield Finding(
            "the training diverges",
            f"the training ELBO was {best:.4g} nats and is {elbo[-1]:.4g} for {_CONFIRMED} epochs",
            "lower lr, clip the gradient (clip_norm) or take lr_schedule='cosine'",
        )
    jumps = sum(after < before - max(5.0, 0.5 * abs(before)) for before, after in _pairs(elbo))
    if jumps >= _CONFIRMED:
        yield Finding(
            "the training jumps",
            f"the training ELBO fell by more than half of itself {jumps} times",
            "lower lr or clip the gradient (clip_norm)",
        )


def _pairs(values: Sequence[float]) -> Iterator[tuple[float, float]]:
    yield from zip(values, values[1:], strict=False)


def _over_fitting(history: History) -> Iterator[Finding]:
    """The held-out ELBO has fallen for good while that of the training data rose."""
    rows = [row for row in history if "valid_elbo" in row]
    if len(rows) < 2 * _CONFIRMED:
        return
    held_out = [row["valid_elbo"] for row in rows]
    best = max(range(len(rows)), key=held_out.__getitem__)
    lost = held_out[best] - max(held_out[-_CONFIRMED:])
    gained = rows[-1]["elbo"] - rows[best]["elbo"]
    if lost > max(2.0, 0.03 * abs(held_out[best])) and gained > 0:
        yield Finding(
            "over-fitting",
            f"since epoch {rows[best]['epoch']:.0f} the held-out ELBO fell by {lost:.3g} nats "
            f"while that of the training data rose by {gained:.3g}",
            "the parameters of the best epoch are kept; stop earlier (patience), take fewer hidden "
            "units, or more data",
        )


# --- a pair --------------------------------------------------------------------------------------


def examine_pair(model: Any, guide: Any, x: Any, *, seed: int = 0) -> list[Finding]:
    """Run a pair on data: collapsed sites, a decoder that ignores z, dead units.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data, held out if possible.
        seed: Seed of the draws; the caller's random stream is untouched.
    """
    found = [*_sites(model, guide, x, seed), *_ignored(model, guide, x, seed)]
    found += _dead_units(model, guide, x, seed)
    return found


def _sites(model: Any, guide: Any, x: Any, seed: int) -> Iterator[Finding]:
    try:
        told = information(model, guide, x, seed=seed)
    except PvaeError:
        return  # global or discrete sites: there is nothing to divide
    sizes: dict[str, int] = {}
    for each in told.dimensions:
        sizes[each.site] = sizes.get(each.site, 0) + 1
    for site, indices in told.collapsed.items():
        if len(indices) == sizes[site]:
            yield Finding(
                f"posterior collapse of site {site!r}",
                f"all of its {sizes[site]} dimensions are their prior whatever x is",
                "let the KL weight rise from 0, give free bits, take more particles (iwae) or a "
                "weaker decoder",
            )


def _ignored(model: Any, guide: Any, x: Any, seed: int) -> Iterator[Finding]:
    """Exchange the latents between data: a decoder that reads them must lose by it."""
    batch, device = _rows(model, guide, x)
    with evaluation(model, guide, seed=seed, device=device):
        layout = inspect(model, guide, batch)
        if layout.globals or num_rows(batch) < 2:
            return
        values, _ = sample_guide(guide, batch, 4, layout)
        order = torch.arange(num_rows(batch), device=device).roll(1)
        moved = {
            name: by_datum(value, layout, name).index_select(1, order)
            .movedim(1, value.dim() - layout.event_dims[name] + layout.data_dim)
            for name, value in values.items()
            if name in layout.event_dims
        }  # fmt: skip
        own = log_joint(model, batch, values, 4, layout)
        other = log_joint(model, batch, moved, 4, layout)
        lost = float((own - other).mean())
    if lost < _IGNORED:
        yield Finding(
            "the decoder ignores the latents",
            f"exchanging them between data costs {lost:.3f} nats",
            "see that z reaches the decoder's output, that nothing bypasses it (x as an input, "
            "teacher forcing), and that the KL weight does not begin at 1",
        )


def _dead_units(model: Any, guide: Any, x: Any, seed: int) -> Iterator[Finding]:
    """Units behind an activation that have the same value for all data and draws."""
    batch, device = _rows(model, guide, x)
    activity: dict[str, Tensor] = {}
    hooks = []
    for role, program in (("model", model), ("guide", guide)):
        module = module_of(program)
        for name, part in () if module is None else module.named_modules():
            if type(part).__module__ == "torch.nn.modules.activation":
                hooks.append(part.register_forward_hook(_note(activity, f"{role}.{name}")))
    try:
        with evaluation(model, guide, seed=seed, device=device):
            layout = inspect(model, guide, batch)
            activity.clear()  # of the runs that found the layout
            values, _ = sample_guide(guide, batch, 1, layout)
            log_joint(model, batch, values, 1, layout)
    finally:
        for hook in hooks:
            hook.remove()
    for name, still in activity.items():
        share = float(still.double().mean())
        if share > _DEAD:
            yield Finding(
                "dead units",
                f"{share:.0%} of the {len(still)} units of {name} have one value for all data",
                "lower lr, take another activation (silu, leaky_relu) or fewer hidden units",
            )


def _note(activity: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        flat = output.detach().reshape(-1, output.shape[-1])
        spread = flat.amax(0) - flat.amin(0)
        activity[name] = spread <= 1e-6 * flat.abs().amax().clamp(min=1e-30)

    return hook


def _rows(model: Any, guide: Any, x: Any, most: int = 256) -> tuple[Any, torch.device]:
    device = next((t.device for t in tensors_of(model, guide)), torch.device("cpu"))
    batch = as_batch(x, device=device)
    return take(batch, torch.arange(min(num_rows(batch), most), device=device)), device


# --- while it runs -------------------------------------------------------------------------------


class Doctor:
    """A tracker that warns once of each thing that goes wrong, after the epoch that shows it.

    Args:
        valid: Held-out data, on which k-hat is followed; without it the history alone is read.
        interval: Epochs between two looks at k-hat.
    """

    def __init__(self, valid: Any = None, *, interval: int = 10) -> None:
        self.valid, self.interval = valid, interval
        self.findings: list[Finding] = []
        self.pareto_k: list[tuple[int, float]] = []

    def start(self, run: Run) -> None:
        """Nothing has happened yet."""

    def epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """Read the history; k-hat where it is its turn."""
        self._tell(examine_history(run.history, finished=False))
        if self.valid is not None and int(row["epoch"]) % self.interval == 0:
            self._follow_k(run, int(row["epoch"]))

    def finish(self, run: Run) -> None:
        """Read the whole history."""
        self._tell(examine_history(run.history, objective=run.objective))

    def _follow_k(self, run: Run, epoch: int) -> None:
        batch, _ = _rows(run.model, run.guide, self.valid, 64)
        found = importance(run.model, run.guide, batch, 200, seed=0)
        if found.pareto_k is None:
            return
        self.pareto_k.append((epoch, float(found.pareto_k.median())))
        self._tell(rising_k(self.pareto_k))

    def _tell(self, findings: Sequence[Finding]) -> None:
        known = {finding.name for finding in self.findings}
        for finding in findings:
            if finding.name not in known:
                self.findings.append(finding)
                if finding.name not in (_WEIGHT, _ROLLED_BACK):  # fit says so itself
                    warnings.warn(str(finding), UserWarning, stacklevel=2)


def rising_k(pareto_k: Sequence[tuple[int, float]]) -> list[Finding]:
    """The median k-hat by epoch: above 0.7, and well above its lowest, three times in a row."""
    if len(pareto_k) < _CONFIRMED + 1:
        return []
    lowest = min(k for _, k in pareto_k)
    recent = [k for _, k in pareto_k[-_CONFIRMED:]]
    if min(recent) < max(_UNRELIABLE, lowest + 0.3):
        return []
    return [
        Finding(
            "k-hat rises",
            f"its median was {lowest:.2f} and is {recent[-1]:.2f}: the guide falls behind the "
            "posterior",
            "give the guide more steps (alternate=), a richer family (flow), or lower lr",
        )
    ]


def report(findings: Sequence[Finding]) -> str:
    """The findings as a list for people; one line where there is none."""
    if not findings:
        return "Nothing was found to be wrong."
    lines = []
    for number, each in enumerate(findings, 1):
        lines += [f"{number}. {each.name}", f"   seen: {each.evidence}", f"   try:  {each.remedy}"]
    return "\n".join(lines)
