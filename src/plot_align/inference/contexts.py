"""What people prefer where: the preferences within each kind of answer that a model tells apart.

A count over whole answers mixes a token's uses: "not" is preferred in a refusal and rejected in a plan. Here the
positions that predict completion tokens are clustered by the model's last hidden state, and tokens are counted within
each cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from plot_align.errors import InputError
from plot_align.head import causal_lm
from plot_align.inference.chat import evaluating
from plot_align.inference.scoring import last_hidden_states, longest_first
from plot_align.preference.distribution import PreferenceDistribution, vocabulary_fingerprint, vocabulary_size
from plot_align.preference.estimation import ScoredSequence
from plot_align.preference.inspection import TokenPreference, inspect
from plot_align.text import readable

if TYPE_CHECKING:
    from rich.console import RenderableType

_SAMPLE = 15_000  # positions that the clusters are found from


@dataclass(frozen=True)
class ContextPreference:
    """One kind of answer: how many tokens it has, and which of them are told apart beyond chance.

    Attributes:
        chosen_tokens, rejected_tokens: counted in it.
        preferred, rejected: tokens with ``|z| ≥ 2``, the largest difference first.
    """

    chosen_tokens: int
    rejected_tokens: int
    preferred: list[TokenPreference]
    rejected: list[TokenPreference]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


@torch.no_grad()
def preferences_by_context(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[tuple[ScoredSequence, ScoredSequence]],
    *,
    contexts: int = 16,
    n: int = 6,
    batch_size: int = 16,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> list[ContextPreference]:
    """The preferences in each of ``contexts`` clusters of positions, those with most of a preference first.

    k-means on the directions of the hidden states (of 15,000 positions, drawn at random), then each position goes to
    the nearest centroid. The hidden states of all positions are kept in half precision: 1 KiB a token at hidden size
    512.

    Args:
        model: a causal language model, best the one that the preference would tune.
        tokenizer: of the model and of the pairs.
        pairs: chosen and rejected of each pair, see :func:`~plot_align.preference.estimation.scored_pairs`.
        contexts: clusters, 2 or more.
        n: at most this many tokens of either side.
        batch_size: sequences of a forward pass.
        seed: of the sample and of the clusters.
        advance: called with the number of sequences that were read.

    Returns:
        The contexts in which both sides have tokens, ordered by ``½ Σ|d|`` over the tokens shown.

    Raises:
        InputError: fewer than 2 contexts, or fewer positions than contexts.
    """
    if contexts < 2:
        raise InputError(f"contexts is {contexts}, expected how many kinds of answers to tell apart, 2 or more")
    sequences = [(sequence, side) for pair in pairs for side, sequence in enumerate(pair)]
    states, tokens, sides = _read(model, sequences, batch_size, advance)
    if len(tokens) < contexts:
        raise InputError(
            f"the pairs have {len(tokens)} completion tokens, too few for {contexts} contexts; expected at least as "
            "many tokens: name more pairs, or ask for fewer contexts"
        )
    nearest = cluster(states, contexts, seed)  # (N,)
    size = vocabulary_size(tokenizer)
    counted = {"tokenizer": {"fingerprint": vocabulary_fingerprint(tokenizer), "size": size}, "sources": []}
    found = []
    for context in range(contexts):
        inside = nearest == context  # (N,)
        chosen, rejected = (torch.bincount(tokens[inside & (sides == side)], minlength=size) for side in (0, 1))
        preference = PreferenceDistribution(chosen, rejected, counted)
        if chosen.any() and rejected.any() and preference.difference().any():
            found.append(_told_apart(preference, tokenizer, n))
    return sorted(found, key=lambda context: -sum(abs(t.difference) for t in context.preferred + context.rejected))


def _read(
    model: Any, sequences: list[tuple[ScoredSequence, int]], batch_size: int, advance: Callable[[int], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Directions ``(N, H)`` of the states that predict a completion token; the tokens and their sides, (N,) each."""
    base = causal_lm(model)
    states, tokens, sides = [], [], []
    with evaluating(base):
        for some in longest_first([sequence for sequence, _ in sequences], batch_size):
            batch = [sequences[i] for i in some]
            hidden, targets, rows = last_hidden_states(base, [sequence for sequence, _ in batch])
            states.append(normalize(hidden.float(), dim=-1).to("cpu", torch.float16))
            tokens.append(targets.cpu())
            sides.append(torch.tensor([side for _, side in batch])[rows])
            advance(len(batch))
    if not tokens:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    return torch.cat(states), torch.cat(tokens), torch.cat(sides)


def cluster(states: Tensor, contexts: int, seed: int) -> Tensor:
    """``(N,)`` the nearest of ``contexts`` centroids by cosine, for directions ``(N, H)``."""
    from scipy.cluster.vq import kmeans2

    generator = np.random.default_rng(seed)
    sample = torch.from_numpy(generator.permutation(len(states))[:_SAMPLE])
    centroids, _ = kmeans2(states[sample].double().numpy(), contexts, minit="++", seed=generator, iter=30)
    directions = normalize(torch.from_numpy(centroids).float(), dim=-1)  # (K, H)
    return torch.cat([(part.float() @ directions.T).argmax(-1) for part in states.split(_SAMPLE)])


def _told_apart(preference: PreferenceDistribution, tokenizer: Any, n: int) -> ContextPreference:
    whole = inspect(preference, tokenizer, n=preference.vocab_size)
    return ContextPreference(
        whole.chosen_tokens,
        whole.rejected_tokens,
        [token for token in whole.preferred if token.z >= 2][:n],
        [token for token in whole.rejected if token.z <= -2][:n],
    )


def render(contexts: list[ContextPreference]) -> RenderableType:
    """A table for a rich console, one row a context."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title="preferred where", title_style="bold", title_justify="left", box=None, pad_edge=False)
    for name in ("tokens", "preferred", "rejected"):
        grid.add_column(name, justify="right" if name == "tokens" else "left")
    for context in contexts:
        sides = ((context.preferred, "blue"), (context.rejected, "dark_orange3"))
        texts = [Text(", ".join(readable(token.text) for token in tokens), style=style) for tokens, style in sides]
        grid.add_row(f"{context.chosen_tokens + context.rejected_tokens:,}", *texts)
    return grid
