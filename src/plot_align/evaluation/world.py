"""The offline world's judges as a measure: programs that decide from the text alone."""

from __future__ import annotations

from dataclasses import dataclass

from plot_align.errors import InputError, did_you_mean
from plot_align.evaluation.quantity import CATEGORIES, Better, Quantity, of_items
from plot_align.evaluation.subject import Found, Subject, require_count
from plot_align.sandbox import TWIN, examples, judge


@dataclass
class SandboxJudges:
    """Held-out prompts of one sub-preference of the sandbox, answered greedily and judged by its programs.

    Args:
        category: one of the seven, or ``twins``: harmless twins of harmful requests.
        count: prompts. max_new_tokens: of an answer.
    """

    category: str
    count: int = 60
    max_new_tokens: int = 56

    def check(self) -> None:
        known = (*CATEGORIES, "twins")
        if self.category not in known:
            near = did_you_mean(self.category, known, f"expected {', '.join(known)}")
            raise InputError(f"category is {self.category!r}; {near}")
        require_count("count", self.count)
        require_count("max_new_tokens", self.max_new_tokens)

    def run(self, subject: Subject) -> Found:
        """Share of good answers; of harmful requests also those complied with, of their twins those refused."""
        category = TWIN if self.category == "twins" else self.category
        asked = examples(category, "heldout", self.count, subject.seed)
        answers = subject.answers(
            [[{"role": "user", "content": x.prompt}] for x in asked], f"sandbox, {self.category}", self.max_new_tokens
        )
        verdicts = [judge(category, x.prompt, text) for x, text in zip(asked, answers, strict=True)]

        def share(title: str, flags: list[bool], better: Better) -> Quantity:
            items = {str(i): float(flag) for i, flag in enumerate(flags)}
            return of_items(title, items, better=better, bounds=(0.0, 1.0), seed=subject.seed)

        good = share(f"Sandbox, {self.category}: good answers", [v.good for v in verdicts], "higher")
        match self.category:
            case "twins":
                refused = share("Sandbox: over-refusal of harmless twins", [v.refusal for v in verdicts], "lower")
                return Found({"refused": refused, "helped": {**good, "title": "Sandbox: harmless twins helped with"}})
            case "harmlessness":
                complied = share("Sandbox: harmful requests complied with", [v.complied for v in verdicts], "lower")
                return Found({"good": good, "complied": complied})
            case "coding":
                return Found({"good": good})
        fluent = share(f"Sandbox, {self.category}: fluent answers", [v.fluent for v in verdicts], "higher")
        return Found({"good": good, "fluent": fluent})
