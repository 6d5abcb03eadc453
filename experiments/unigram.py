"""How much of PLOT's effect a fixed bias on the logits has, without any training.

    python experiments/unigram.py --data path/to/data

At the granularity of a batch the term's gradient in the logits is ``p_t ⊙ (s − ⟨p_t, s⟩)`` with one potential s for
all positions, so to first order it adds ``−η·s`` to the logits everywhere. Trains an arm without PLOT (A) and with it
(B) on the same pairs, and compares B with A + bias at held-out answers:

    share = 1 − min_η KL(B ‖ A − η·s) / KL(B ‖ A)

and the same for the best bias there is, whatever its direction, fitted on one half of the answers and measured on the
other: an upper bound for all terms that know nothing of the position.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from plot_align.demo.fetch import fetch
from plot_align.demo.train import quiet
from plot_align.inference.chat import evaluating
from plot_align.inference.scoring import last_hidden_states
from plot_align.plot import PlotLoss
from plot_align.preference.batch import Batch
from plot_align.preference.estimation import ScoredSequence
from plot_align.records import write_record
from real import PAIRS, RECORDS, STEPS, Study
from study import data
from study.arms import ARMS
from study.measures import given_answers


def chosen_answers(tokenizer: Any, pairs: list[data.Pair]) -> list[ScoredSequence]:
    return given_answers(tokenizer, [(row["prompt"][-1]["content"], row["chosen"][0]["content"]) for row in pairs])


@torch.no_grad()
def log_outputs(model: Any, rows: list[ScoredSequence]) -> Tensor:
    """``(n, V)`` log-probabilities at every position that predicts an answer's token."""
    with evaluating(model):
        hidden, _, _ = last_hidden_states(model, rows)
    return (hidden @ model.get_output_embeddings().weight.T).float().log_softmax(-1)


def mean_potential(study: Study, model: Any, reference: Any, seed: int, plot: Any) -> Tensor:
    """``(V,)`` the derivative of L_PLOT in the mean output, averaged over the training micro-batches."""
    loss = PlotLoss(study.preference, reference.get_input_embeddings().weight.detach(), plot)
    rows = chosen_answers(study.tokenizer, data.draw(study.kinds, PAIRS * STEPS, PAIRS, seed, study.tokenizer))
    total = torch.zeros(reference.get_output_embeddings().weight.size(0), dtype=torch.float64)
    for begin in range(0, len(rows), PAIRS):
        batch = rows[begin : begin + PAIRS]
        means = [log_outputs(m, batch).exp().mean(0, keepdim=True).double() for m in (model, reference)]
        output, labels = means[0].requires_grad_(), torch.zeros(1, 2, dtype=torch.long)
        target, _ = loss.targets(Batch(labels, torch.ones(1)), output, means[1])
        (potential,) = torch.autograd.grad(loss.divergence.value(output, target).sum(), output)
        total += potential[0]
    return total / (len(rows) / PAIRS)


def divergence(log_b: Tensor, log_a: Tensor, bias: Tensor) -> float:
    """Mean KL of B to A with a bias on its logits, in nats a token."""
    biased = (log_a + bias).log_softmax(-1)
    return float((log_b.exp() * (log_b - biased)).sum(-1).mean())


def best_bias(log_b: Tensor, log_a: Tensor) -> Tensor:
    """``(V,)`` the bias that minimises the divergence: convex, so gradient descent on it finds the one."""
    bias = torch.zeros(log_a.size(-1), requires_grad=True)
    mean_b = log_b.exp().mean(0)
    optimizer = torch.optim.LBFGS([bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Σ_t KL has the gradient mean softmax(a + bias) − mean b; its value up to a constant:
        value = torch.logsumexp(log_a + bias, -1).mean() - (mean_b * bias).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return bias.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", choices=["mixed", "human"], default="mixed")
    parser.add_argument("--arms", nargs=2, default=["DPO", "DPO+PLOT"], metavar="ARM", help="without PLOT, with it")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()
    study = Study(options.model or fetch(), options.pairs, options.data, options.output, 4)
    plain, with_plot = (study.train(ARMS[name], options.seed)[0] for name in options.arms)
    plot, reference = ARMS[options.arms[1]].plot, study.load()
    rows = chosen_answers(study.tokenizer, study.bench.pairs)
    halves = [(log_outputs(with_plot, rows[i::2]), log_outputs(plain, rows[i::2])) for i in (0, 1)]
    potential = mean_potential(study, plain, reference, options.seed, plot).float()
    results: dict[str, float] = {}
    (fit_b, fit_a), (log_b, log_a) = halves
    nothing = divergence(log_b, log_a, torch.zeros_like(potential))
    found = minimize_scalar(lambda eta: divergence(fit_b, fit_a, -eta * potential), bounds=(0, 100), method="bounded")
    results["kl"], results["eta"] = nothing, float(found.x)
    results["share_potential"] = 1 - divergence(log_b, log_a, -found.x * potential) / nothing
    results["share_any_bias"] = 1 - divergence(log_b, log_a, best_bias(fit_b, fit_a)) / nothing
    print({name: round(value, 4) for name, value in results.items()})
    path = options.records / "unigram" / options.pairs / f"seed-{options.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, "study", results, config={"arms": options.arms, "data": options.pairs}, seed=options.seed)


if __name__ == "__main__":
    main()
