"""Pictures of runs, samples and boards: each function returns a matplotlib ``Figure``.

No display is needed and no global state of ``pyplot`` is touched. Colours are those of Okabe & Ito
(2008), which colour-blind readers can tell apart; where there may be more series than colours,
markers differ too.
"""

from pvae.plots.boards import board, standings
from pvae.plots.calibrations import coverage_curves, predictive_histograms, rank_histograms
from pvae.plots.curves import game_curves, selection_curves, training_curves
from pvae.plots.evidences import evidence_against, gap_ledger, weights_diagnostics
from pvae.plots.figures import save
from pvae.plots.latents import latent_information, latent_scatter
from pvae.plots.samples import reconstructions, samples_beside_data

__all__ = [
    "board",
    "coverage_curves",
    "evidence_against",
    "game_curves",
    "gap_ledger",
    "latent_information",
    "latent_scatter",
    "predictive_histograms",
    "rank_histograms",
    "reconstructions",
    "samples_beside_data",
    "save",
    "selection_curves",
    "standings",
    "training_curves",
    "weights_diagnostics",
]
