"""A loop of your own with PLOT, plain torch: cross-entropy on the preferred answers, and the term on the logits."""

from __future__ import annotations

import torch
from common import arguments, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align import PlotLoss, estimate, line

options = arguments(__doc__)
alpha = 0.1 if options.alpha is None else options.alpha
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model).train()
data = pairs()
preference = estimate(data, tokenizer)
rows = model.get_output_embeddings().weight.size(0)
plot = PlotLoss(preference.target(size=rows), line(model.get_input_embeddings().weight))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

history = []
for step in range(options.steps):
    batch = [data[(8 * step + i) % len(data)] for i in range(8)]
    chats = [row["prompt"] + row["chosen"] for row in batch]
    tokens = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in batch]
    starts = [len(prompt["input_ids"]) for prompt in prompts]
    places = torch.arange(tokens["input_ids"].size(1))  # (T,)
    answered = tokens["attention_mask"].bool() & (places >= torch.tensor(starts)[:, None])  # (B, T)

    logits = model(**tokens).logits[:, :-1]  # (B, T-1, V): position t predicts token t + 1
    mask = answered[:, 1:]  # (B, T-1)
    vanilla = torch.nn.functional.cross_entropy(logits[mask], tokens["input_ids"][:, 1:][mask])
    distance = plot(logits, mask)
    optimizer.zero_grad()
    (vanilla + alpha * distance).backward()
    optimizer.step()
    history.append((vanilla.item(), distance.item()))

print(f"\n{'':22}{'first':>8}{'last':>10}")
for name, values in zip(("plot/vanilla_loss", "plot/loss"), zip(*history, strict=True), strict=True):
    print(f"{name:20}{values[0]:10.4f}{values[-1]:10.4f}")
