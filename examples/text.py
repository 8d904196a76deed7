"""A VAE of sentences beside an LSTM language model of the same size, on the Penn Treebank.

Both are judged as the field does: nats a sentence and perplexity, the end of a sentence counted as
a word, by importance sampling for the VAE; with the KL, the mutual information and the active units
that tell whether its latent is used. Then it writes, reconstructs and goes from one sentence to
another.

Run:  python examples/text.py                        (the first 14,000 sentences of ptb)
      python examples/text.py --data mine.txt        (one sentence a line)
      python examples/text.py --data grammar         (a toy language, no file needed)
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvae
from pvae import runs
from pvae.data import Dataset
from pvae.data.text import words_of
from pvae.guides.exact import Exact
from pvae.guides.text import TextEncoder
from pvae.models.language_model import LanguageModel
from pvae.models.text import Text
from pvae.schedules import Cyclical
from pvae.sentences import UNKNOWN, num_words
from pvae.sequences import perplexity


def grammar(size: int = 400, seed: int = 0) -> list[str]:
    """Sentences of a toy language: who does what to whom, and where."""
    draw = random.Random(seed)
    nouns = ["the cat", "a dog", "the old man", "a child", "my neighbour", "the queen"]
    verbs = ["sees", "follows", "paints", "calls"]
    places = ["in the garden", "by the sea", "at night", ""]
    return [
        " ".join([draw.choice(nouns), draw.choice(verbs), draw.choice(nouns), draw.choice(places)])
        for _ in range(size)
    ]


def load(data: str, folder: Path) -> Dataset:
    """A named set, a text file, or the toy language written beside the results."""
    if data != "grammar":
        return pvae.data.load(data)
    path = folder / "grammar.txt"
    path.write_text("\n".join(grammar()) + "\n")
    return pvae.data.load(path)


def train(
    dataset: Dataset,
    x: Tensor,
    folder: Path,
    *,
    epochs: int,
    hidden: int,
    z_dim: int,
    dropout: float,
    nats: float,
) -> dict[str, pvae.Run]:
    """The language model and the VAE, on the same sentences."""
    sizes: dict[str, Any] = {"num_levels": dataset.num_levels, "dropout": dropout}
    sizes |= {"embedding": hidden, "hidden": hidden}
    torch.manual_seed(0)
    language_model = LanguageModel(dataset.x_dim, **sizes)
    torch.manual_seed(0)
    text = Text(dataset.x_dim, z_dim=z_dim, **sizes)
    guide = TextEncoder(text.latents, text, embedding=hidden, hidden=hidden // 2, dropout=dropout)
    # The KL costs little at first, then its full price in two cycles, and nothing below `nats`.
    steps = epochs * -(-len(x) // 32)
    objective = pvae.vae(beta=Cyclical(steps, cycles=2, start=0.05), free_bits=nats)
    pairs: dict[str, Any] = {
        "language model": (language_model, Exact(language_model), None),
        "vae": (text, guide, objective),
    }
    return {
        name: pvae.fit(
            model, guide, x, valid=dataset.valid, objective=objective, epochs=epochs, batch_size=32,
            lr=4e-3, lr_schedule="cosine", clip_norm=5.0, engine="eager",
            run_dir=folder / name.replace(" ", "-"),
        )
        for name, (model, guide, objective) in pairs.items()
    }  # fmt: skip


def judge(trained: dict[str, pvae.Run], test: Tensor, num_particles: int) -> dict[str, Any]:
    """Nats a sentence, perplexity, and what the latent carries."""
    words = num_words(test)
    model = trained["language model"].model.eval()
    with torch.no_grad():
        log_p = torch.cat([model.log_evidence(part) for part in torch.split(test, 64)])
    run = trained["vae"]
    evidence = pvae.evidence.importance(run.model, run.guide, test, num_particles)
    latent = pvae.evidence.information(run.model, run.guide, test)
    return {
        "num_sentences": len(test),
        "words_per_sentence": float(words.double().mean()),
        "num_particles": num_particles,
        "language model": {"nll": float(-log_p.mean()), "perplexity": perplexity(log_p, words)},
        "vae": {
            "nll": -evidence.mean,
            "perplexity": perplexity(evidence.log_evidence, words),
            "minus_elbo": float(-evidence.elbo.mean()),
            "kl": latent.kl,
            "mutual_information": latent.mutual_information,
            "active_units": latent.active_units,
        },
    }


@torch.no_grad()
def written(run: pvae.Run, dataset: Dataset, test: Tensor) -> str:
    """Samples in three ways, reconstructions, and a walk between two sentences."""
    model, guide, words = run.model.eval(), run.guide.eval(), dataset.vocabulary or ()
    write = partial(model.write, avoid=[UNKNOWN], length=20)
    torch.manual_seed(1)
    z = torch.randn(5, model.z_dim)
    lines = []
    for title, options in {
        "drawn from the prior, temperature 1": {},
        "drawn from the same latents, nucleus 0.9": {"top_p": 0.9},
        "written from them greedily": {"temperature": 0.0},
    }.items():
        lines += [f"# {title}", *words_of(write(z, **options), words), ""]
    chosen = test[num_words(test) > 1][:4]
    loc = guide.posterior(chosen)["z"].mean
    lines.append("# sentences, and what is written from their posterior means")
    for original, copy in zip(
        words_of(chosen, words), words_of(write(loc, temperature=0.0), words), strict=True
    ):
        lines += [original, f"  -> {copy}"]
    shares = torch.linspace(0, 1, 6)[:, None]
    between = (1 - shares) * loc[0] + shares * loc[1]
    lines += ["", "# from the first of these to the second"]
    lines += words_of(write(between, temperature=0.0), words)
    return "\n".join(lines) + "\n"


def main(
    data: str = "ptb",
    num_sentences: int = 14000,
    epochs: int = 3,
    hidden: int = 64,
    z_dim: int = 16,
    dropout: float = 0.0,
    free_bits: float = 4.0,
    num_test: int = 300,
    num_particles: int = 50,
    out: str | None = None,
) -> None:
    """Train both, judge both, write; everything lands in one folder."""
    final = Path(out) if out else runs.next_folder("example-text")
    settings = {name: value for name, value in locals().items() if name not in ("final", "out")}
    with runs.create(final) as folder:
        runs.write_json(folder / "config.json", settings)
        dataset = load(data, folder)
        print(dataset.description())
        x, test = dataset.train.x[:num_sentences], dataset.test.x[:num_test]
        trained = train(
            dataset,
            x,
            folder,
            epochs=epochs,
            hidden=hidden,
            z_dim=z_dim,
            dropout=dropout,
            nats=free_bits,
        )
        found = judge(trained, test, num_particles)
        runs.write_json(folder / "results.json", found)
        text = written(trained["vae"], dataset, test)
        (folder / "samples.txt").write_text(text)
        histories = {name: run.history for name, run in trained.items()}
        pvae.plots.save(
            pvae.plots.training_curves(histories), folder / "figures" / "training_curves.png"
        )
        run = trained["vae"]
        latent = pvae.evidence.information(run.model, run.guide, test)
        pvae.plots.save(
            pvae.plots.latent_information(latent), folder / "figures" / "latent_information.png"
        )
    print(text)
    for name in trained:
        print(f"{name:15} " + ", ".join(f"{key} {value:.2f}" for key, value in found[name].items()))
    print(f"wrote {final}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="ptb", help="a named set, a .txt file, or grammar")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num-sentences", type=int, default=14000, help="to train on")
    parser.add_argument("--num-test", type=int, default=300, help="to judge by")
    parser.add_argument("--num-particles", type=int, default=50, help="of importance sampling")
    parser.add_argument("--out", help="folder to write (runs/example-text-<n>)")
    main(**vars(parser.parse_args()))
