"""The language-model head and PLOT's output distribution in one pass over the logits.

``fused.py`` holds one block of the ``(N, V)`` logits at a time; the tests compare it with ``tests/oracles/head.py``,
which materialises them all. ``logits.py`` starts from logits that already exist.
"""

from plot_align.head.fused import HeadOutput, HeadSpec, fused_head
from plot_align.head.logits import output_distribution, target_log_probs
from plot_align.head.memory import Workspace
from plot_align.head.model import causal_lm, head_logits, head_spec

__all__ = [
    "HeadOutput",
    "HeadSpec",
    "Workspace",
    "causal_lm",
    "fused_head",
    "head_logits",
    "head_spec",
    "output_distribution",
    "target_log_probs",
]
