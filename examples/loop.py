"""A loop of your own, plain torch: DPO by hand, and PLOT on its logits, with the defaults that `attach` has."""

from __future__ import annotations

import torch
from common import arguments, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align import BalancedAlpha, PlotLoss, estimate

BETA, PAIRS = 0.1, 4
options = arguments(__doc__)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model, reference = (AutoModelForCausalLM.from_pretrained(options.model) for _ in range(2))
model.train()
data = pairs()
plot = PlotLoss(estimate(data, tokenizer), reference.get_input_embeddings().weight)
balance = BalancedAlpha()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)


def batch(rows):
    """The chosen answers of some pairs above the rejected ones, labels on the answers only, and whose each row is."""
    chats = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    tokens = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows] * 2
    starts = torch.tensor([len(prompt["input_ids"]) for prompt in prompts])
    in_prompt = torch.arange(tokens["input_ids"].size(1)) < starts[:, None]  # (2B, T)
    labels = tokens["input_ids"].masked_fill(in_prompt | (tokens["attention_mask"] == 0), -100)
    return tokens, labels, torch.tensor([1, -1]).repeat_interleave(len(rows))


def log_probs(logits, labels):
    """Of each row's answer: (2B, T, V), (2B, T) → (2B,)."""
    each = -torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")  # 0 where −100
    return each.sum(-1)


history = []
for step in range(options.steps):
    tokens, labels, roles = batch([data[(PAIRS * step + i) % len(data)] for i in range(PAIRS)])
    outputs = model(**tokens, output_hidden_states=True)
    with torch.no_grad():
        reference_logits = reference(**tokens).logits

    reward = BETA * (log_probs(outputs.logits, labels) - log_probs(reference_logits, labels))  # (2B,)
    vanilla = -torch.nn.functional.logsigmoid(reward[roles > 0] - reward[roles < 0]).mean()
    term = plot(outputs.logits, labels, roles, reference_logits=reference_logits)
    alpha = balance(vanilla, term, outputs.hidden_states[-1]) if options.alpha is None else options.alpha

    optimizer.zero_grad()
    (vanilla + alpha * term).backward()
    optimizer.step()
    history.append((vanilla.item(), term.item(), alpha))

print(f"\n{'':22}{'first':>8}{'last':>10}")
for name, values in zip(("vanilla_loss", "loss", "alpha"), zip(*history, strict=True), strict=True):
    print(f"plot/{name:15}{values[0]:10.4f}{values[-1]:10.4f}")
