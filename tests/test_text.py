"""The text model, the language model and their guides: normalised, causal, blind to padding."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import pvae
from pvae.cli import main
from pvae.guides.exact import Exact
from pvae.guides.text import TextEncoder
from pvae.models.language_model import LanguageModel
from pvae.models.text import Text
from pvae.models.vae import VAE
from pvae.sentences import Sentences, choose, num_words, trim
from pvae.sequences import per_step, perplexity

VOCABULARY, LENGTH = 9, 6


def text_pair(encoder="convolutional", **options):
    torch.manual_seed(1)
    model = Text(
        LENGTH, num_levels=VOCABULARY, z_dim=3, embedding=5, hidden=7,
        **({"dropout": 0.0} | options),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    guide = TextEncoder(
        model.latents, model, encoder=encoder, embedding=5, hidden=4, dropout=0.0
    ).double()
    return model, guide


def language_model(num_levels=VOCABULARY, **options):
    torch.manual_seed(2)
    model = LanguageModel(LENGTH, num_levels=num_levels, embedding=4, hidden=5, **options)
    return model.double()


def sentences(*lengths: int) -> torch.Tensor:
    """Rows of random words; a length counts the end."""
    torch.manual_seed(3)
    x = torch.randint(2, VOCABULARY, (len(lengths), LENGTH))
    for row, length in zip(x, lengths, strict=True):
        row[length - 1], row[length:] = 1, 0
    return x


def language(num_levels: int, length: int) -> torch.Tensor:
    """Every sentence of at most ``length`` words, those cut before their end among them."""
    rows = []
    for words in range(length + 1):
        for chosen in itertools.product(range(2, num_levels), repeat=words):
            ended = [*chosen, 1] if words < length else [*chosen]
            rows.append(ended + [0] * (length - len(ended)))
    return torch.tensor(rows)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("skip_padding", [True, False])
def test_probabilities_of_a_tiny_language_sum_to_one(skip_padding, tied):
    model = language_model(num_levels=5, tied=tied)
    model.skip_padding = skip_padding
    every = language(5, 4)
    assert len(every) == sum(3**n for n in range(5))
    assert model.log_evidence(every).logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
    text, _ = text_pair()
    z = torch.randn(2, 1, 3, dtype=torch.float64)
    table = Sentences(text.decoder, z.expand(2, len(language(9, 2)), 3), len(language(9, 2)), 2)
    assert torch.allclose(table.log_prob(language(9, 2)).logsumexp(-1), torch.zeros(2).double())


def test_tied_words_have_one_vector_each():
    """The output layer scores a word by its embedding, and both uses move it."""
    tied, apart = language_model(tied=True), language_model()
    fewer = sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in tied.parameters())
    assert fewer == (VOCABULARY - 1) * 5 - 5 * 4 - 4
    decoder, x = tied.decoder, sentences(6, 3)
    given = decoder.output(decoder(x, None))
    expected = given @ decoder.embedding.weight[1:].T + decoder.bias
    chosen = expected.log_softmax(-1).gather(-1, (x - 1).clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(tied.log_evidence(x), (chosen * (x != 0)).sum(-1), atol=1e-12)
    tied.log_evidence(x[:1, :1]).sum().backward()  # the word read is the end alone
    assert (decoder.embedding.weight.grad[1:].abs().sum(-1) > 0).all()


def test_padding_that_is_predicted_is_caught(monkeypatch):
    """With padding counted as a word the probabilities of the language sum to less than one."""
    model = language_model(num_levels=5)
    monkeypatch.setattr("pvae.sentences.PADDING", -1)
    model.skip_padding = False
    assert model.log_evidence(language(5, 4)).logsumexp(0).item() < -0.1


def test_drawn_sentences_have_the_probabilities_of_the_language():
    model = language_model(num_levels=4)
    model.x_dim = 3
    every = language(4, 3)
    drawn = model(size=20_000)
    expected = model.log_evidence(every).exp().detach()
    found = (drawn[:, None] == every).all(-1).double().mean(0)
    assert float(found.sum()) == 1.0
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((found - expected).abs() < 4.5 * error).all()


def test_exact_nll_of_a_tiny_language_by_every_latent():
    """log p(x) by importance sampling against quadrature over a latent of one dimension."""
    torch.manual_seed(4)
    model = Text(3, num_levels=5, z_dim=1, embedding=4, hidden=5, dropout=0.0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    guide = TextEncoder(model.latents, model, embedding=4, hidden=4).double()
    x = language(5, 3)[[0, 2, 9, 30]]
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    z = grid[:, None, None].expand(-1, len(x), 1)
    log_joint = (
        model.decode(z, 3).log_prob(x) - 0.5 * grid[:, None] ** 2 - 0.5 * math.log(2 * math.pi)
    )
    truth = log_joint.logsumexp(0) + math.log(18 / 4000)
    found = pvae.evidence.importance(model, guide, x, 20_000)
    assert ((found.log_evidence - truth).abs() < 4.5 * found.stderr).all()
    assert (found.stderr < 0.05).all()


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    model = language_model()
    with torch.no_grad():
        model.decoder.output.weight.zero_()
        model.decoder.output.bias.zero_()
    x = sentences(6, 3, 1)
    classes = VOCABULARY - 1  # every number but padding, the end among them
    assert perplexity(model.log_evidence(x), num_words(x)) == pytest.approx(classes)
    without_end = perplexity(model.log_evidence(x), (num_words(x) - 1).clamp(min=1))
    assert without_end > classes + 1  # the planted error of not counting ends


@pytest.mark.parametrize("encoder", ["convolutional", "lstm"])
@pytest.mark.parametrize("skip_padding", [True, False])
def test_padding_never_changes_a_likelihood_or_a_posterior(encoder, skip_padding):
    model, guide = text_pair(encoder, skip_padding=skip_padding)
    x = sentences(6, 4, 1, 3)
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    together = model.decode(z, LENGTH).log_prob(x)
    assert together.shape == (2, 4)
    for row, length in enumerate([6, 4, 1, 3]):
        alone = x[[row], :length]
        found = model.decode(z[:, [row]], length).log_prob(alone)[:, 0]
        assert torch.allclose(found, together[:, row], atol=1e-12)
        q, q_alone = guide.posterior(x)["z"], guide.posterior(alone)["z"]
        assert torch.allclose(q.mean[row], q_alone.mean[0], atol=1e-12)


def test_skipping_padding_changes_nothing_but_the_work():
    model, _ = text_pair()
    x, z = sentences(5, 4, 1, 3), torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for skip in (True, False):
        model.skip_padding = skip
        log_p = model.decode(z, LENGTH).log_prob(x)
        found.append((log_p, *torch.autograd.grad(log_p.sum(), [z, *model.decoder.parameters()])))
    for skipped, full in zip(*found, strict=True):
        assert torch.allclose(skipped, full, atol=1e-12)
    assert torch.equal(trim(x), x[:, :5])


def test_logits_in_pieces_are_the_logits(monkeypatch):
    model, _ = text_pair()
    x, z = sentences(6, 4, 1, 3), torch.randn(2, 4, 3, dtype=torch.float64)
    whole = model.decode(z, LENGTH).log_prob(x)
    monkeypatch.setattr("pvae.sentences._MAX_LOGITS", 3 * VOCABULARY)
    assert torch.allclose(model.decode(z, LENGTH).log_prob(x), whole, atol=1e-12)


def test_decoder_is_causal():
    model, _ = text_pair()
    model.eval()
    x, z = sentences(6, 6), torch.randn(2, 3, dtype=torch.float64)
    before = model.decoder(x, z)
    for t in range(LENGTH):
        other = x.clone()
        other[:, t] = (x[:, t] + 1) % VOCABULARY
        changed = (model.decoder(other, z) != before).any(-1).any(0)
        assert changed.tolist() == [False] * (t + 1) + [True] * (LENGTH - t - 1)
    # The causality check sees a decoder that reads the word it predicts.
    looking = model.decoder(torch.roll(x, -1, 1), z)
    other = x.clone()
    other[:, 2] = (x[:, 2] + 1) % VOCABULARY
    assert (model.decoder(torch.roll(other, -1, 1), z) != looking)[:, 2].any()


def test_word_dropout_hides_words_in_training_alone():
    model, _ = text_pair(word_dropout=1.0)
    x, z = sentences(6, 6), torch.randn(2, 3, dtype=torch.float64)
    other = x.clone()
    other[:, 0] = (x[:, 0] + 1) % VOCABULARY
    assert torch.equal(model.decoder(x, z), model.decoder(other, z))
    model.eval()
    assert not torch.equal(model.decoder(x, z), model.decoder(other, z))


def test_evaluating_a_language_model_drops_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [" ".join(f"w{(i + j) % 5}" for j in range(2 + i % 3)) for i in range(60)]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    command = ["train", "language_model", "--data", "mine.txt", "--model.dropout", "0.5",
               "--epochs", "1", "--run-dir", "run", "--engine", "eager"]  # fmt: skip
    assert main(command) == 0
    assert main(["evaluate", "run", "--num-particles", "2"]) == 0
    about = json.loads((tmp_path / "run" / "evidence.json").read_text())
    assert about["exact_log_evidence"] == pytest.approx(about["log_evidence"], abs=1e-5)


def test_language_model_is_exact_at_one_particle():
    model = language_model()
    x = sentences(6, 4, 1)
    found = pvae.evidence.importance(model, Exact(model), x, 3)
    assert torch.allclose(found.log_evidence, model.log_evidence(x), atol=1e-12)
    assert (found.stderr < 1e-6).all()


def test_greedy_temperature_and_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    assert choose(logits, 0.0).eq(0).all()
    assert set(choose(logits, top_p=0.5).tolist()) == {0}
    assert set(choose(logits, top_p=0.79).tolist()) == {0, 1}
    assert set(choose(logits, top_p=0.81).tolist()) == {0, 1, 2}
    share = choose(logits[:, [3, 1, 0, 2]], top_p=0.79).eq(2).double().mean()
    assert abs(share - 0.625) < 4.5 * (0.625 * 0.375 / 4000) ** 0.5
    sharp = choose(logits, temperature=0.5).eq(0).double().mean()
    expected = 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    assert abs(sharp - expected) < 4.5 * (expected * (1 - expected) / 4000) ** 0.5
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(pvae.PvaeError, match="temperature is at least 0"):
            choose(logits, **wrong)


def test_written_sentences_end_once_and_are_padded_after():
    model, _ = text_pair()
    z = torch.randn(200, 3, dtype=torch.float64)
    x = model.write(z, top_p=0.9)
    for row in x.tolist():
        kept = row[: row.index(1) + 1] if 1 in row else row
        assert 0 not in kept
        assert not any(row[len(kept) :])
    assert torch.equal(model.write(z, temperature=0.0), model.write(z, temperature=0.0))
    assert model.write(z, length=3).shape == (200, 3)
    assert model.training


def test_words_to_avoid_are_never_written():
    model, _ = text_pair()
    z = torch.randn(200, 3, dtype=torch.float64)
    assert {2, 3} <= set(model.write(z).unique().tolist())
    assert not {2, 3} & set(model.write(z, avoid=[2, 3]).unique().tolist())
    assert not {2, 3} & set(model.write(z, temperature=0.0, avoid=[2, 3]).unique().tolist())
    for wrong, said in (([0], "numbers of words"), (range(1, VOCABULARY), "every word")):
        with pytest.raises(pvae.PvaeError, match=said):
            model.write(z, avoid=wrong)


@pytest.mark.parametrize("encoder", ["convolutional", "lstm"])
def test_staged_training_is_eager_training(encoder):
    histories = []
    for engine in ("eager", "staged"):
        model, guide = text_pair(encoder, skip_padding=False, word_dropout=0.3)
        model, guide = model.float(), guide.float()  # where oneDNN would take the LSTM
        run = pvae.fit(
            model, guide, sentences(4, 3, 1, 3, 4, 4)[:, :4], epochs=2, batch_size=3, lr=1e-2,
            engine=engine, progress=False,
        )  # fmt: skip
        assert run.engine.startswith(engine)
        histories.append([row["bound"] for row in run.history])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


def test_free_bits_keep_a_latent_that_the_plain_elbo_gives_up():
    """Two kinds of sentences, which an LSTM tells apart only at its first word."""
    torch.manual_seed(6)
    x = torch.tensor([[3, 3, 3, 1, 0, 0], [4, 4, 4, 4, 1, 0]]).repeat(32, 1)
    kl = {}
    for nats in (0.0, 0.6):
        torch.manual_seed(6)
        model = Text(LENGTH, num_levels=VOCABULARY, z_dim=2, embedding=8, hidden=16, dropout=0.0)
        guide = TextEncoder(model.latents, model, embedding=8, hidden=8, dropout=0.0)
        pvae.fit(
            model, guide, x, objective=pvae.vae(free_bits=nats), epochs=40, batch_size=64, lr=1e-2,
            engine="eager", progress=False,
        )  # fmt: skip
        kl[nats] = pvae.evidence.information(model, guide, x).kl
    assert kl[0.6] > 0.5
    assert kl[0.0] < kl[0.6]


def test_quoted_figures_are_those_of_the_formulas():
    evidence = pvae.Evidence.exact(torch.tensor([-6.0, -4.0]))
    found = per_step(evidence, torch.tensor([3, 1]))
    assert found.evidence == pytest.approx(10 / 4)
    assert found.bound == pytest.approx(10 / 4)
    assert found.mean_of_sequences == pytest.approx((2 + 4) / 2)
    assert str(found) == "2.500 (2.500) {3.000}"
    for lengths in (torch.tensor([3, 0]), torch.tensor([3])):
        with pytest.raises(pvae.PvaeError, match="lengths must be at least 1"):
            per_step(evidence, lengths)
        with pytest.raises(pvae.PvaeError, match="lengths must be at least 1"):
            perplexity(torch.tensor([-6.0, -4.0]), lengths)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Text(6, num_levels=2), "besides its words"),
        (lambda: Text(6, dropout=1.5), "dropout and word_dropout are shares"),
        (lambda: TextEncoder({"z": (3,)}, VAE(6)), "no model of them"),
        (lambda: TextEncoder({"z": (3, 2)}, Text(6)), "latents that are vectors"),
        (lambda: TextEncoder({"z": (3,)}, Text(6), encoder="conv"), "'convolutional' or 'lstm'"),
    ],
)
def test_wrong_arguments_are_one_sentence(build, match):
    with pytest.raises(pvae.PvaeError, match=match) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_word_outside_the_vocabulary_is_refused():
    model, guide = text_pair()
    x = sentences(6, 4)
    x[1, 0] = VOCABULARY
    with pytest.raises(pvae.PvaeError) as caught:
        pvae.draw(model, guide, x)
    assert "\n" not in str(caught.value)


def test_the_command_line_trains_on_batches_of_like_length(tmp_path, capsys, monkeypatch):
    """And goes on with such a run; data without lengths are refused before anything is written."""
    lines = [" ".join("abcdefgh"[: 1 + n % 8]) for n in range(80)]
    (tmp_path / "words.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    size = ["--model.hidden", "6", "--model.embedding", "6", "--model.tied", "true"]
    train = ["train", "language-model", "--guide", "exact", "--batch-size", "8", "--lr", "0.01"]
    spread = []
    kept = Sentences.log_prob

    def look(self, value):
        if self.decoder.training:
            spread.append(int(num_words(value).max() - num_words(value).min()))
        return kept(self, value)

    monkeypatch.setattr(Sentences, "log_prob", look)
    for bucket in ([], ["--bucket-by", "length"]):
        spread.clear()
        assert main([*train, *size, "--data", "words.txt", "--epochs", "2", *bucket]) == 0
        mean = sum(spread) / len(spread)
        assert (mean < 3) == bool(bucket), spread
    run = "runs/language-model-words-2"
    assert main(["train", "--resume", run, "--epochs", "3"]) == 0
    assert main(["train", "--resume", run, "--epochs", "4", "--bucket-by", "none"]) == 66
    assert "bucket_by" in capsys.readouterr().err
    assert main(["train", "vae", "--data", "digits", "--bucket-by", "length"]) == 2
    assert "is for sentences, and digits has none" in capsys.readouterr().err
    assert main([*train, "--data", "words.txt", "--bucket-by", "size"]) == 2
    assert sorted(path.name for path in Path("runs").iterdir() if path.name[0] != ".") == [
        "language-model-words-1", "language-model-words-2",
    ]  # fmt: skip


def test_other_text_is_judged_by_the_words_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts, things = ("one", "two", "three", "four"), ("cats", "dogs", "old men")
    lines = [f"{count} {thing}" for count in counts for thing in things]
    Path("own.txt").write_text("\n".join(lines * 3))
    Path("other.txt").write_text("\n".join(reversed(lines * 3)))
    Path("strange.txt").write_text("\n".join(["eins hund", "zwei katzen"] * 9))
    Path("long.txt").write_text("\n".join(["one two three four cats dogs"] * 18))
    train = ["train", "text", "--data", "own.txt", "--epochs", "1", "--run-dir", "run"]
    assert main([*train, "--model.hidden", "8", "--model.embedding", "8"]) == 0
    capsys.readouterr()
    judge = ["evaluate", "run", "--num-particles", "5", "--data"]
    assert main([*judge, "other.txt"]) == 0
    assert "<unk>" not in capsys.readouterr().err
    assert main([*judge, "strange.txt"]) == 0
    assert "36 of 36 words are not in the vocabulary of train" in capsys.readouterr().err
    assert main([*judge, "long.txt"]) != 0
    assert "expected at most 4: shorten it" in capsys.readouterr().err
    Path("own.txt").rename("moved.txt")
    assert main([*judge, "other.txt"]) != 0
    assert "own.txt, are not there: put them back" in capsys.readouterr().err


def test_a_model_of_tables_is_told_of_the_padding(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("\n".join(["a b c", "d"] * 12))
    train = ["train", "vae", "--data", "own.txt", "--epochs", "1", "--run-dir", "run"]
    assert main([*train, "--model.hidden", "[8]", "--guide.hidden", "[8]"]) == 0
    said = capsys.readouterr().err
    assert "stand after the end of a sequence" in said
    assert "text or language_model" in said
