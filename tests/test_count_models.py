"""Models of counts: densities by scipy's formulas, draws by their moments, and real cells."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from torch import Tensor

import pvae
from pvae.baselines import NegativeBinomialMixture
from pvae.count_distributions import MultinomialTotals, negative_binomial
from pvae.errors import DataError, OptionError, ProgramError
from pvae.guides.counts import Counts
from pvae.models.count import Count
from pvae.models.latent_dirichlet import LatentDirichlet
from pvae.models.semi_supervised import SemiSupervised
from pvae.models.sparse_gamma import SparseGamma

SIGMAS = 4.5
X_DIM, SIZE = 5, 6


def log_joint(model, values, x: Tensor) -> float:
    with torch.no_grad():
        trace = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(x)
        return float(trace.log_prob_sum())


def numpy(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def counts() -> Tensor:
    return torch.poisson(torch.full((SIZE, X_DIM), 3.0, dtype=torch.float64))


class TestDistributions:
    log_mean = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    log_dispersion = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def test_negative_binomial_by_its_mean(self):
        x = torch.arange(12.0, dtype=torch.float64)[:, None]
        r, mean = self.log_dispersion.exp(), self.log_mean.exp()
        expected = scipy.stats.nbinom.logpmf(numpy(x), numpy(r), numpy(r / (r + mean)))
        found = negative_binomial(self.log_mean, self.log_dispersion)
        assert np.abs(numpy(found.log_prob(x)) - expected).max() < 1e-10
        assert torch.allclose(found.mean, mean)
        assert torch.allclose(found.variance, mean + mean**2 / r)
        swapped = scipy.stats.nbinom.logpmf(numpy(x), numpy(r), numpy(mean / (r + mean)))
        assert np.abs(numpy(found.log_prob(x)) - swapped).max() > 0.1

    def test_inflated_zeros(self):
        x, gate = torch.arange(12.0, dtype=torch.float64)[:, None], torch.tensor(0.4).double()
        plain = negative_binomial(self.log_mean, self.log_dispersion).log_prob(x).exp()
        found = negative_binomial(self.log_mean, self.log_dispersion, gate).log_prob(x).exp()
        share = gate.sigmoid()
        expected = (1 - share) * plain + share * (x == 0)
        assert (found - expected).abs().max() < 1e-12

    def test_multinomial_with_totals(self):
        logits, x = torch.randn(SIZE, X_DIM, dtype=torch.float64), counts()
        found = MultinomialTotals(logits, x.sum(-1)).log_prob(x)
        p = numpy(logits.softmax(-1))
        expected = scipy.stats.multinomial.logpmf(numpy(x), numpy(x.sum(-1)), p)
        assert np.abs(numpy(found) - expected).max() < 1e-10

    def test_multinomial_draws(self):
        logits, total = torch.randn(3, X_DIM), torch.tensor([1.0, 20.0, 7.0])
        family = MultinomialTotals(logits, total)
        drawn = family.sample((4000,))
        assert torch.equal(drawn.sum(-1), total.expand(4000, 3))
        error = (drawn.mean(0) - family.mean) / (drawn.std(0) / 4000**0.5).clamp(min=1e-6)
        assert error.abs().max() < SIGMAS


class TestCount:
    @pytest.mark.parametrize("likelihood", ["negative_binomial", "poisson"])
    def test_joint_density(self, likelihood):
        torch.manual_seed(0)
        model = Count(X_DIM, z_dim=2, hidden=(4,), likelihood=likelihood).double()
        x, z, size = counts(), torch.randn(SIZE, 2).double(), torch.randn(SIZE).double()
        mean = size.exp()[:, None] * (model.decoder(z) + model.log_profile).softmax(-1)
        library = numpy(model.library_loc), numpy(model.library_log_scale.exp())
        expected = scipy.stats.norm.logpdf(numpy(z)).sum()
        expected += scipy.stats.norm.logpdf(numpy(size), *library).sum()
        if likelihood == "poisson":
            expected += scipy.stats.poisson.logpmf(numpy(x), numpy(mean)).sum()
        else:
            r = model.log_dispersion.exp()
            expected += scipy.stats.nbinom.logpmf(numpy(x), numpy(r), numpy(r / (r + mean))).sum()
        found = log_joint(model, {"z": z, "log_library": size}, x)
        assert found == pytest.approx(expected, abs=1e-9)

    def test_means_begin_at_those_of_the_data(self):
        mean = torch.tensor([0.5, 3.0, 10.0, 1.0, 2.0])
        model = Count(X_DIM, x_mean=mean)
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.zero_()
            family = model.decode(torch.zeros(10), model.library_loc)
        assert torch.allclose(family.mean, mean, rtol=1e-4)

    def test_beats_independent_columns_on_cells(self, data_root, monkeypatch):
        monkeypatch.setenv("PVAE_DATA", str(data_root))
        dataset = pvae.data.load("smfish", transform="none")
        columns = NegativeBinomialMixture(1).fit(dataset.train.x)
        torch.manual_seed(0)
        model = Count(dataset.x_dim, z_dim=8, hidden=(64,), x_mean=dataset.train.x.mean(0))
        guide = Counts(dataset.x_dim, model.latents, model, hidden=(64,))
        pvae.fit(model, guide, dataset.train.x, epochs=12, batch_size=128, lr=4e-3,
                 engine="staged", progress=False)  # fmt: skip
        found = pvae.evidence.importance(model, guide, dataset.test.x, 50).log_evidence
        gain = found - columns.score_samples(dataset.test.x)
        assert gain.mean() > 1.0
        assert gain.mean() > SIGMAS * gain.std() / len(gain) ** 0.5

    def test_refuses_an_unknown_likelihood(self):
        with pytest.raises(OptionError, match="did you mean 'poisson'"):
            Count(X_DIM, likelihood="poison")


class TestLatentDirichlet:
    @pytest.mark.parametrize("prior", ["dirichlet", "logistic_normal"])
    @pytest.mark.parametrize("decoder", ["mixture", "product"])
    def test_joint_density(self, prior, decoder):
        torch.manual_seed(0)
        model = LatentDirichlet(
            X_DIM, num_topics=3, prior=prior, decoder=decoder, concentration=0.7
        ).double()
        x, topics = counts(), torch.randn(SIZE, 3, dtype=torch.float64)
        weights = topics.softmax(-1)
        if prior == "dirichlet":
            topics = weights
            expected = sum(scipy.stats.dirichlet.logpdf(numpy(w), [0.7] * 3) for w in weights)
        else:
            scale = math.sqrt((1 - 1 / 3) / 0.7)
            expected = scipy.stats.norm.logpdf(numpy(topics), 0, scale).sum()
        if decoder == "product":
            p = (weights @ model.words).softmax(-1)
        else:
            p = weights @ model.words.softmax(-1)
        expected += scipy.stats.multinomial.logpmf(numpy(x), numpy(x.sum(-1)), numpy(p)).sum()
        assert log_joint(model, {"topics": topics}, x) == pytest.approx(expected, abs=1e-5)

    def test_finds_planted_topics(self):
        """Documents of two disjoint vocabularies: the topics part them, as one topic cannot."""
        torch.manual_seed(0)
        true = torch.tensor([[5.0] * 5 + [0.0] * 5, [0.0] * 5 + [5.0] * 5])
        x = torch.poisson(true[torch.randint(2, (400,))])
        model = LatentDirichlet(10, num_topics=2, decoder="mixture", concentration=0.5)
        guide = Counts(10, model.latents, model, hidden=(16,))
        pvae.fit(model, guide, x[:300], epochs=25, batch_size=50, lr=2e-2, engine="staged",
                 progress=False)  # fmt: skip
        found = pvae.evidence.importance(model, guide, x[300:], 50).log_evidence
        one_topic = MultinomialTotals(x[:300].sum(0).log(), x[300:].sum(-1)).log_prob(x[300:])
        share = model.words.softmax(-1)[:, :5].sum(-1)
        assert share.max() > 0.9
        assert share.min() < 0.1
        assert (found - one_topic).mean() > 5.0

    def test_batch_norm_couples_a_batch_in_training_alone(self):
        model = LatentDirichlet(X_DIM, num_topics=3, batch_norm=True)
        topics = torch.randn(SIZE, 3)
        model.train()
        assert not torch.allclose(model.word_logits(topics)[:3], model.word_logits(topics[:3]))
        model.eval()
        assert torch.allclose(model.word_logits(topics)[:3], model.word_logits(topics[:3]))


class TestSparseGamma:
    def test_joint_density(self):
        torch.manual_seed(0)
        model = SparseGamma(X_DIM, widths=(3, 2), shape=0.6).double()
        x, top, low = counts(), torch.rand(SIZE, 2).double() + 0.1, torch.rand(SIZE, 3).double()
        weights = [torch.nn.functional.softplus(w) for w in model.raw_weights]
        mean = top @ weights[1] + 1e-6
        expected = scipy.stats.gamma.logpdf(numpy(top), 0.6, scale=1 / 0.6).sum()
        expected += scipy.stats.gamma.logpdf(numpy(low), 0.6, scale=numpy(mean / 0.6)).sum()
        expected += scipy.stats.poisson.logpmf(numpy(x), numpy(low @ weights[0] + 1e-6)).sum()
        found = log_joint(model, {"z_2": top, "z_1": low}, x)
        assert found == pytest.approx(expected, abs=1e-9)

    def test_layers_keep_the_mean_of_the_data(self):
        torch.manual_seed(0)
        mean = torch.tensor([1.0, 4.0, 2.0, 8.0, 0.5])
        model = SparseGamma(X_DIM, widths=(20, 10), shape=2.0, x_mean=mean)
        with torch.no_grad():
            drawn = model(size=20_000)
        error = (drawn.mean(0) - mean) / mean
        assert error.abs().max() < 0.5

    @pytest.mark.parametrize("positive", ["gamma", "log_normal"])
    def test_learns_digits_beyond_independent_poissons(self, positive):
        dataset = pvae.data.load("digits", transform="none")
        mean = dataset.train.x.mean(0)
        torch.manual_seed(0)
        model = SparseGamma(dataset.x_dim, widths=(30, 10), x_mean=mean)
        guide = Counts(dataset.x_dim, model.latents, model, hidden=(64,), positive=positive)
        run = pvae.fit(model, guide, dataset.train.x, epochs=16, batch_size=64, lr=1e-2,
                       clip_norm=100.0, engine="staged", progress=False)  # fmt: skip
        rates = torch.distributions.Poisson(mean.clamp(min=1e-2))
        columns = rates.log_prob(dataset.train.x).sum(-1).mean()
        assert run.history[-1]["elbo"] > float(columns) + 5

    def test_refuses_no_layer(self):
        with pytest.raises(OptionError, match="at least one layer"):
            SparseGamma(X_DIM, widths=())


def test_counts_guide_refuses_a_class():
    model = SemiSupervised(X_DIM)
    with pytest.raises(ProgramError, match="no family"):
        Counts(X_DIM, model.latents, model)


@pytest.mark.parametrize(("name", "shape"), [("smfish", (4530, 33)), ("pbmc4k", (4271, 2000))])
def test_single_cells_are_read(name, shape, data_root, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(data_root))
    dataset = pvae.data.load(name, transform="none")
    splits = dataset.train, dataset.valid, dataset.test
    assert (sum(map(len, splits)), dataset.x_dim) == shape
    assert dataset.kind == "integer"
    classes = torch.cat([split.labels for split in splits]).unique()
    assert classes.tolist() == list(range(len(classes)))


def test_missing_and_changed_cells_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="set PVAE_DATA"):
        pvae.data.load("smfish", root=tmp_path / "cache")
    (tmp_path / "single_cell").mkdir()
    np.savez(tmp_path / "single_cell" / "smfish.npz", data=np.ones(3))
    with pytest.raises(DataError, match="SHA-256 differs"):
        pvae.data.load("smfish", root=tmp_path / "cache")
