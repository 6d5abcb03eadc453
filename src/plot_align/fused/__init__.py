"""The language-model head and PLOT's output distribution in one sweep over the logits.

``reference.py`` is the specification: it materialises the ``(N, V)`` logits. ``chunked.py`` never holds more than
one block of them and matches it.
"""

from .chunked import HeadOutput, HeadSpec, fused_head

__all__ = ["HeadOutput", "HeadSpec", "fused_head"]
