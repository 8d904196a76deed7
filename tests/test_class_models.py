"""Models of classes and labels: densities by hand, sums over classes, and what they learn."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

import pvae
from pvae.errors import DataError, OptionError, ProgramError
from pvae.guides.class_conditional import ClassConditional
from pvae.guides.conditional import Conditional as ConditionalGuide
from pvae.guides.gaussian import Gaussian
from pvae.models.conditional import Conditional
from pvae.models.gmm_vae import GMMVAE
from pvae.models.semi_supervised import SemiSupervised

SIGMAS = 4.5
X_DIM, SIZE = 5, 7
SMALL = {"z_dim": 2, "hidden": (8,)}
MIXED = {"gradient": pvae.gradients.mixed, "num_particles": 4}


def normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale, dtype=value.dtype)
    square = ((value - loc) / scale).square()
    return (-0.5 * square - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    return torch.where(x > 0.5, p, 1 - p).log().sum(-1)


def log_joint(model, values, *batch) -> Tensor:
    """``log p`` of given values, by site, from Pyro's own trace."""
    with torch.no_grad():
        trace = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(*batch)
        return trace.log_prob_sum()


def digits() -> pvae.data.Dataset:
    return pvae.data.load("digits", binarize="fixed")


def gmm_vae(*, marginal: bool = False) -> GMMVAE:
    torch.manual_seed(0)
    model = GMMVAE(X_DIM, num_components=3, marginal=marginal, **SMALL).double()
    with torch.no_grad():
        model.prior_logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        model.prior_raw_scale.add_(torch.tensor([[0.0], [-1.0], [1.0]]))
    return model


class TestGMMVAE:
    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        x = (torch.rand(SIZE, X_DIM, dtype=torch.float64) < 0.5).double()
        return x, torch.randn(SIZE, 2, dtype=torch.float64), torch.randint(3, (SIZE,))

    def by_hand(self, model: GMMVAE, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        scale = torch.nn.functional.softplus(model.prior_raw_scale) + 1e-3
        prior = model.prior_logits.log_softmax(0)[c] + normal(z, model.prior_loc[c], scale[c])
        return prior + bernoulli(x, model.decoder(z))

    def test_joint_density(self):
        model = gmm_vae()
        x, z, c = self.values()
        expected = self.by_hand(model, x, z, c).sum()
        found = log_joint(model, {"component": c, "z": z}, x)
        assert abs(found - expected) < 1e-10
        wrong = self.by_hand(model, x, z, (c + 1) % 3).sum()
        assert abs(found - wrong) > 1e-2

    def test_marginal_sums_the_components_out(self):
        model = gmm_vae()
        x, z, _ = self.values()
        summed = torch.stack(
            [self.by_hand(model, x, z, torch.full((SIZE,), c)) for c in range(3)]
        ).logsumexp(0)
        marginal = gmm_vae(marginal=True)
        marginal.load_state_dict(model.state_dict())
        assert abs(log_joint(marginal, {"z": z}, x) - summed.sum()) < 1e-10

    def test_responsibilities_are_bayes(self):
        model = gmm_vae()
        x, z, _ = self.values()
        joint = torch.stack(
            [self.by_hand(model, x, z, torch.full((SIZE,), c)) for c in range(3)], -1
        )
        assert (model.log_responsibilities(z) - joint.log_softmax(-1)).abs().max() < 1e-10

    def test_enumeration_and_mixed_gradient_have_one_bound(self):
        model, draws = gmm_vae(), 2000
        x = self.values()[0]
        guide = ClassConditional(X_DIM, model.latents, model, hidden=(8,)).double()
        log_weights = pvae.draw(model, guide, x, draws).log_weights.sum(1).detach()
        enumerated = torch.tensor(
            [
                -float(pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x))
                for _ in range(100)
            ]
        )
        error = math.hypot(log_weights.std() / draws**0.5, enumerated.std() / 100**0.5)
        assert abs(log_weights.mean() - enumerated.mean()) < SIGMAS * error

    def test_clusters_digits(self):
        dataset = digits()
        torch.manual_seed(0)
        model = GMMVAE(dataset.x_dim, z_dim=5, hidden=(64,), marginal=True)
        guide = Gaussian(dataset.x_dim, model.latents, hidden=(64,))
        pvae.fit(model, guide, dataset.train.x, epochs=25, batch_size=64, lr=3e-3,
                 engine="staged", progress=False)  # fmt: skip
        with torch.no_grad():
            z = guide.posterior(dataset.test.x)["z"].mean
            found = model.log_responsibilities(z).argmax(-1)
        truth = dataset.test.labels
        chance = normalized_mutual_info_score(truth, found[torch.randperm(len(found))])
        assert normalized_mutual_info_score(truth, found) > chance + 0.3

    def test_refuses_no_component(self):
        with pytest.raises(OptionError, match="num_components must be at least 1"):
            GMMVAE(X_DIM, num_components=0)


def semi_supervised(alpha: float = 1.0) -> tuple[SemiSupervised, ClassConditional]:
    torch.manual_seed(0)
    model = SemiSupervised(X_DIM, num_classes=3, **SMALL).double()
    with torch.no_grad():
        model.class_logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
    guide = ClassConditional(X_DIM, model.latents, model, hidden=(8,), alpha=alpha).double()
    return model, guide


class TestSemiSupervised:
    def x(self) -> Tensor:
        torch.manual_seed(1)
        return (torch.rand(SIZE, X_DIM, dtype=torch.float64) < 0.5).double()

    @pytest.mark.parametrize("known", [True, False])
    def test_joint_density(self, known):
        model, _ = semi_supervised()
        x, z = self.x(), torch.randn(SIZE, 2, dtype=torch.float64)
        label, other = torch.arange(SIZE) % 3, (torch.arange(SIZE) + 1) % 3
        output = model.decoder(torch.cat([torch.eye(3, dtype=torch.float64)[label], z], -1))
        prior = model.class_logits.log_softmax(0)[label]
        expected = (prior + normal(z, 0.0, 1.0) + bernoulli(x, output)).sum()
        given, drawn = (label, other) if known else (torch.full((SIZE,), -1), label)
        found = log_joint(model, {"y": drawn, "z": z}, x, given)
        assert abs(found - expected) < 1e-10

    def test_unknown_label_is_the_sum_over_known_ones(self):
        """``log p(x) = log sum_y p(x, y)``, each by importance sampling."""
        model, guide = semi_supervised()
        x = self.x()

        def evidence(label: int) -> tuple[Tensor, Tensor]:
            batch = x, torch.full((SIZE,), label)
            found = pvae.evidence.importance(model, guide, batch, 5000)
            return found.log_evidence, found.stderr

        parts = torch.stack([evidence(label)[0] for label in range(3)])
        whole, stderr = evidence(-1)
        error = (stderr**2 + max(evidence(label)[1].max() for label in range(3)) ** 2).sqrt()
        assert ((whole - parts.logsumexp(0)).abs() < SIGMAS * error).all()
        assert ((whole - parts.mean(0)).abs() > SIGMAS * error).all()

    def test_classification_term_is_added_in_training_to_known_rows_alone(self):
        model, guide = semi_supervised(alpha=2.5)
        x, y = self.x(), torch.tensor([0, 1, 2, -1, -1, 0, 1])

        def weights() -> Tensor:
            torch.manual_seed(3)
            return pvae.draw(model, guide, (x, y), 4).log_weights

        training = weights()
        guide.eval()
        score = guide.classify(x).log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0]
        expected = torch.where(y >= 0, 2.5 * score, torch.zeros(()))
        assert (training - weights() - expected).abs().max() < 1e-10

    def test_classifier_of_known_rows_learns_from_the_term_alone(self):
        model, guide = semi_supervised(alpha=2.5)
        x, y = self.x(), torch.arange(SIZE) % 3
        goal = pvae.Objective(**MIXED)
        loss = goal.evaluate(model, guide, (x, y), layout=goal.prepare(model, guide, (x, y)))
        loss.loss.backward()
        found = [p.grad.clone() for p in guide.classifier.parameters()]
        score = guide.classify(x).log_softmax(-1).gather(1, y[:, None])
        expected = torch.autograd.grad(-2.5 * score.mean(), list(guide.classifier.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < 1e-10
        assert max(float(g.abs().max()) for g in found) > 1e-3

    def test_enumeration_and_mixed_gradient_have_one_bound(self):
        model, guide = semi_supervised()
        batch, draws = (self.x(), torch.tensor([0, 1, 2, -1, -1, -1, -1])), 4000
        log_weights = pvae.draw(model, guide, batch, draws).log_weights.sum(1).detach()
        elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
        enumerated = torch.tensor([-float(elbo.loss(model, guide, *batch)) for _ in range(100)])
        error = math.hypot(log_weights.std() / draws**0.5, enumerated.std() / 100**0.5)
        assert abs(log_weights.mean() - enumerated.mean()) < SIGMAS * error

    def test_classifies_digits_from_a_hundred_labels(self):
        from pvae.runs import keep_labels

        dataset = digits()
        torch.manual_seed(0)
        model = SemiSupervised(dataset.x_dim, z_dim=5, hidden=(64,))
        guide = ClassConditional(dataset.x_dim, model.latents, model, hidden=(64,), alpha=20.0)
        y = keep_labels(dataset.train.labels, 100)
        assert int((y >= 0).sum()) == 100
        assert torch.bincount(y[y >= 0]).tolist() == [10] * 10
        pvae.fit(model, guide, (dataset.train.x, y), objective=pvae.Objective(**MIXED), epochs=25,
                 batch_size=64, lr=3e-3, engine="staged", progress=False)  # fmt: skip
        with torch.no_grad():
            found = guide.classify(dataset.test.x).argmax(-1)
        right = float((found == dataset.test.labels).double().mean())
        commonest = torch.bincount(dataset.train.labels).argmax()
        assert right > float((dataset.test.labels == commonest).double().mean()) + 0.45

    def test_wake_sleep_is_refused_where_labels_are_missing(self):
        model, guide = semi_supervised()
        batch = model.example_batch(4)
        with pytest.raises(ProgramError, match="y_observed"):
            pvae.wake_sleep().prepare(model, guide, batch)


class TestConditional:
    @pytest.mark.parametrize("prior", ["standard", "conditional"])
    @pytest.mark.parametrize("y_dim", [None, 4])
    def test_joint_density(self, prior, y_dim):
        torch.manual_seed(0)
        model = Conditional(X_DIM, num_classes=3, y_dim=y_dim, prior=prior, **SMALL).double()
        x = (torch.rand(SIZE, X_DIM, dtype=torch.float64) < 0.5).double()
        z = torch.randn(SIZE, 2, dtype=torch.float64)
        y = torch.arange(SIZE) % 3 if y_dim is None else torch.randn(SIZE, 4, dtype=torch.float64)
        features = torch.eye(3, dtype=torch.float64)[y] if y_dim is None else y
        loc, scale = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        if prior == "conditional":
            loc, raw = model.prior_network(features).chunk(2, -1)
            scale = torch.nn.functional.softplus(raw) + 1e-3
        logits = model.decoder(torch.cat([features, z], -1))
        expected = (normal(z, loc, scale) + bernoulli(x, logits)).sum()
        assert abs(log_joint(model, {"z": z}, x, y) - expected) < 1e-10

    def test_draws_one_datum_for_each_condition(self):
        model = Conditional(X_DIM, num_classes=3, **SMALL)
        y = torch.tensor([2, 0, 1, 1])
        x, same = model(None, y)
        assert x.shape == (4, X_DIM)
        assert torch.equal(same, y)

    def test_right_labels_score_higher_than_wrong_ones(self):
        dataset = digits()
        torch.manual_seed(0)
        model = Conditional(dataset.x_dim, z_dim=5, hidden=(64,))
        guide = ConditionalGuide(dataset.x_dim, model.latents, model, hidden=(64,))
        train, test = (dataset.train.x, dataset.train.labels), dataset.test
        pvae.fit(model, guide, train, epochs=20, batch_size=64, lr=3e-3, engine="staged",
                 progress=False)  # fmt: skip
        right, wrong = (
            pvae.evidence.importance(model, guide, (test.x, y), 100).log_evidence
            for y in (test.labels, (test.labels + 1) % 10)
        )
        gain = right - wrong
        assert gain.mean() > SIGMAS * gain.std() / len(gain) ** 0.5

    def test_guide_refuses_a_model_without_a_condition(self):
        model = GMMVAE(X_DIM, **SMALL)
        with pytest.raises(ProgramError, match="use the gaussian guide"):
            ConditionalGuide(X_DIM, model.latents, model)


def test_class_conditional_guide_refuses_a_model_without_a_class():
    model = Conditional(X_DIM, **SMALL)
    with pytest.raises(ProgramError, match="one categorical site"):
        ClassConditional(X_DIM, model.latents, model)


def test_command_line_takes_what_suits_the_model(tmp_path, capsys):
    """The guide and the gradient of ``train_defaults``, and 50 known labels."""
    from pvae.cli import main

    folder = tmp_path / "run"
    small = ["--model.hidden", "[8]", "--guide.hidden", "[8]", "--model.z_dim", "2"]
    command = ["train", "semi_supervised", "--data", "digits", "--labels", "50", "--epochs", "1"]
    code = main([*command, *small, "--engine", "eager", "--run-dir", str(folder)])
    assert not code, capsys.readouterr().err
    run = pvae.load(folder)
    assert isinstance(run.guide, ClassConditional)
    assert run.objective.gradient == pvae.gradients.mixed
    assert run.model.num_classes == 10
    assert "labels: 50\n" in (folder / "config.yaml").read_text()


def test_labels_must_be_there_and_enough():
    from pvae.runs import batch_for, keep_labels

    with pytest.raises(DataError, match="needs a label for each datum"):
        batch_for(Conditional(X_DIM, **SMALL), torch.zeros(3, X_DIM), None)
    with pytest.raises(OptionError, match="labels must be from 0 to the 3"):
        keep_labels(torch.arange(3), 4)
    assert keep_labels(torch.arange(3), 0).tolist() == [-1, -1, -1]
