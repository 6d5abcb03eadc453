"""GSM8K and MATH as preference pairs: the right solution against one with an error in it.

    python recipes/data/logic.py --gsm8k openai/gsm8k --math DigitalLearningGmbH/MATH-lighteval \\
      --output runs/data/logic/train.jsonl --sft runs/data/logic/sft.jsonl

Nobody publishes the pairs of the paper; these are our reading. The rejected solution is the right one with a single
error, whose consequences are worked out to the end, so that it reads as well as the right one and both end alike.

GSM8K writes every calculation as ``<<48/2=24>>``, so that an error can be carried through all later lines:

- ``off_by_one``: one result is one too large or too small;
- ``lost_carry``: one result is ten too large or too small;
- ``swapped_operation``: one ``+`` became ``-``, a ``-`` or a ``*`` became ``+``, a ``/`` became ``*``;
- ``dropped_step``: one line is missing, and from there on an earlier result in it stands for its own.

The annotations are taken out of both sides; both end with ``#### answer``. In MATH one number of the boxed answer is
changed by one or two, from where it is first the result of an equation (``propagated``), or in the box alone where
the problem names that number (``last_step``).

An error is kept only where the answer changes, where no result turns negative, and where whole numbers stay whole.
Rows without such an error are dropped and counted. Which error it is depends on the seed and the problem, not on the
order of the rows.
"""

from __future__ import annotations

import argparse
import ast
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pairs import count, pair, write

from plot_align.errors import InputError, PlotAlignError
from plot_align.preference.datasets import load_pairs

KINDS = ("off_by_one", "lost_carry", "swapped_operation", "dropped_step")
_SWAPPED = {"+": "-", "-": "+", "*": "+", "/": "*"}
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


class Unfit(ValueError):
    """No error of this kind fits here."""


@dataclass(frozen=True)
class Corrupted:
    """A solution with an error in it.

    Args:
        text: the solution, GSM8K's annotations still in it.
        answer: the wrong answer as it stands at the end.
        kind: of the error. line: of the solution as it was, where the error is made.
    """

    text: str
    answer: str
    kind: str
    line: int


def value(text: str) -> Fraction:
    """A number as people write it; ``1,200.50`` is 1200.5."""
    return Fraction(text.replace(",", ""))


def evaluate(expression: str) -> Fraction:
    """The value of ``+ - * / ( )`` over numbers, exactly.

    Raises:
        Unfit: it is something else (``50%*4``), or divides by zero.
    """

    def of(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() | float()):
                return Fraction(str(node.value))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -of(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](of(left), of(right))
        raise Unfit("no arithmetic")

    # Python reads no number with a leading zero.
    plain = _NUMBER.sub(lambda found: found[0].replace(",", "").lstrip("0") or "0", expression)
    try:
        return of(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError):
        raise Unfit("no arithmetic") from None


def written(number: Fraction, like: str) -> str:
    """``number`` as text, with commas where ``like`` has them.

    Raises:
        Unfit: it needs more than two places.
    """
    if (number * 100).denominator != 1:
        raise Unfit("too many places")
    text = f"{number.numerator:,}" if number.denominator == 1 else f"{float(number):,.2f}".rstrip("0")
    return text if "," in like else text.replace(",", "")


def without_annotations(text: str) -> str:
    return _ANNOTATION.sub("", text)


def corrupt_gsm8k(question: str, answer: str, seed: int = 0) -> Corrupted:
    """One solution with an error.

    Args:
        question: the problem. answer: GSM8K's solution with its annotations.
        seed: decides, with the problem, which error.

    Raises:
        Unfit: none fits.
    """
    body, _, final = answer.rpartition("####")
    lines = body.strip().split("\n")
    rng = random.Random(f"{seed} {question}")
    for kind in rng.sample(KINDS, len(KINDS)):
        # A number of the question that equals a result would change with it.
        named = {value(number) for number in _NUMBER.findall(question)}
        for line, start in rng.sample(places := list(_places(lines)), len(places)):
            try:
                found = _Solution(lines, final.strip(), named).with_error(kind, line, start, rng)
            except Unfit:
                continue
            return Corrupted(*found, kind, line)
    raise Unfit("no error fits")


def _places(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Line and position of every annotation."""
    for number, line in enumerate(lines):
        for found in _ANNOTATION.finditer(line):
            yield number, found.start()


@dataclass
class _Solution:
    """A solution that is read from top to bottom and written anew, an error made on the way."""

    lines: list[str]
    final: str
    named: set[Fraction]  # numbers of the question

    def with_error(self, kind: str, line: int, start: int, rng: random.Random) -> tuple[str, str]:
        """(text, answer) with an error of ``kind`` in the annotation at ``start`` of ``line``.

        Raises:
            Unfit: it cannot be made there, or what follows from it is implausible.
        """
        self.changed: dict[Fraction, Fraction] = {}  # a result as it was → as it is now
        self.results: set[Fraction] = set()  # of the lines read so far, as they were
        out = []
        for number, text in enumerate(self.lines):
            if number == line and kind == "dropped_step":
                self._drop(text)
                continue
            out.append(self._line(text, start if number == line else None, kind, rng))
        right = value(self.final) if _NUMBER.fullmatch(self.final) else None
        if right is None or self.changed.get(right, right) == right:
            raise Unfit("the answer stays")
        wrong = written(self.changed[right], self.final)
        return "\n".join([*out, f"#### {wrong}"]), wrong

    def _drop(self, text: str) -> None:
        annotations = _ANNOTATION.findall(text)
        if len(annotations) != 1 or len(self.lines) < 2:
            raise Unfit("more than a step")
        expression, result = annotations[0]
        earlier = [number for number in map(value, _NUMBER.findall(expression)) if number in self.results]
        if not earlier:
            raise Unfit("the first step of its branch")
        self._change(_result(expression, result), earlier[-1], made_here=True)

    def _line(self, text: str, start: int | None, kind: str, rng: random.Random) -> str:
        out, end = "", 0
        for found in _ANNOTATION.finditer(text):
            before, (expression, result) = self._renumbered(text[end : found.start()]), found.groups()
            is_here = found.start() == start
            if _NUMBER.fullmatch(result):
                self.results.add(value(result))
            now = self._renumbered(expression)
            if is_here or now != expression:
                old = _result(expression, result)
                if is_here and kind == "swapped_operation":
                    before, now = _swap(before, now, rng)
                new = evaluate(now)
                if is_here and kind in ("off_by_one", "lost_carry"):
                    new += rng.choice((-1, 1)) * (1 if kind == "off_by_one" else 10)
                self._change(old, new, made_here=is_here)
                result = written(new, result)
            out, end = f"{out}{before}<<{now}={result}>>", found.end()
        return out + self._renumbered(text[end:])

    def _change(self, old: Fraction, new: Fraction, *, made_here: bool) -> None:
        if made_here and (new == old or old in self.named):
            raise Unfit("nothing changes, or more than the result does")
        if new <= 0 or (old.denominator == 1 and new.denominator != 1):
            raise Unfit("implausible")
        self.changed[old] = new

    def _renumbered(self, text: str) -> str:
        def replace(found: re.Match[str]) -> str:
            old = value(found[0])
            return written(self.changed[old], found[0]) if old in self.changed else found[0]

        return _NUMBER.sub(replace, text)


def _result(expression: str, result: str) -> Fraction:
    """The result of an annotation.

    Raises:
        Unfit: it is not what its expression gives (rounded, or in other units).
    """
    if not _NUMBER.fullmatch(result.strip()) or evaluate(expression) != value(result.strip()):
        raise Unfit("not the result of its expression")
    return value(result.strip())


def _swap(before: str, expression: str, rng: random.Random) -> tuple[str, str]:
    """Another operation in the expression, and in the text in front of it, which shows the same.

    Raises:
        Unfit: the text shows something else.
    """
    parts = re.findall(rf"{_NUMBER.pattern}|[-+*/()]", expression)
    if "".join(parts) != expression.replace(" ", ""):
        raise Unfit("no arithmetic")
    shown = r"\s*".join(
        rf"(\$?{re.escape(part)}%?)"
        if _NUMBER.fullmatch(part)
        else r"([*x×])"
        if part == "*"
        else f"({re.escape(part)})"
        for part in parts
    )
    found = list(re.finditer(shown, before))
    places = [index for index, part in enumerate(parts) if part in _SWAPPED and index > 0]
    if not found or not places:
        raise Unfit("not shown")
    place = rng.choice(places)
    other = _SWAPPED[parts[place]]
    at, to = found[-1].span(place + 1)
    parts[place] = other
    return before[:at] + other + before[to:], "".join(parts)


def math_answer(solution: str) -> str:
    r"""What stands in the last ``\boxed{…}``; empty where there is none."""
    start, end = _box(solution)
    return solution[start:end]


def _box(solution: str) -> tuple[int, int]:
    """Where the content of the last box begins and ends; (0, 0) without one."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return 0, 0
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return start, end
    return 0, 0


def corrupt_math(problem: str, solution: str, seed: int = 0) -> Corrupted:
    """One solution with an error; arguments and errors as :func:`corrupt_gsm8k`."""
    start, end = _box(solution)
    rng = random.Random(f"{seed} {problem}")
    numbers = list(re.finditer(r"(?<![\d.])(?:0|[1-9]\d*)(?![\d.])", solution[start:end]))
    if any(int(found[0]) == 0 for found in numbers):  # a factor of 0 hides a change of the others
        numbers = [found for found in numbers if int(found[0]) == 0]
    if not numbers:
        raise Unfit("no number in the box")
    chosen = rng.choice(numbers)
    old = chosen[0]
    steps = [step for step in (-2, -1, 1, 2) if int(old) + step > 0]
    new = str(int(old) + rng.choice(steps))
    whole = rf"(?<![\d.]){old}(?![\d]|\.\d)"
    result = None if re.search(whole, problem) else re.search(rf"=\s*\$?\s*{whole}", solution[:start])
    answer = solution[start:end][: chosen.start()] + new + solution[start:end][chosen.end() :]
    if result is None:
        return Corrupted(solution[:start] + answer + solution[end:], answer, "last_step", solution.count("\n"))
    at = result.start()
    text = solution[:at] + re.sub(whole, new, solution[at:])
    line = solution.count("\n", 0, at)
    return Corrupted(text, math_answer(text), "propagated", line)


def gsm8k_pair(row: dict[str, str], seed: int) -> tuple[dict, str]:
    """(pair, kind of its error)"""
    corrupted = corrupt_gsm8k(row["question"], row["answer"], seed)
    return _pair(row["question"], row["answer"], corrupted)


def math_pair(row: dict[str, str], seed: int) -> tuple[dict, str]:
    """(pair, kind of its error)"""
    return _pair(row["problem"], row["solution"], corrupt_math(row["problem"], row["solution"], seed))


def _pair(problem: str, solution: str, corrupted: Corrupted) -> tuple[dict, str]:
    prompt = [{"role": "user", "content": problem}]
    return pair(prompt, without_annotations(solution), without_annotations(corrupted.text)), corrupted.kind


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", metavar="DATA", help="hub id or local file with question and answer")
    parser.add_argument("--math", metavar="DATA", help="hub id or local file with problem and solution")
    parser.add_argument("--split", default="train", help="of hub data sets (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides which error each solution gets (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the pairs, .jsonl")
    parser.add_argument("--sft", type=Path, help="problem and right solution alone, .jsonl")
    options = parser.parse_args(arguments)
    rows, dropped, kinds = [], [], []
    try:
        sources = [
            (name, source, configuration, make)
            for name, source, configuration, make in (
                ("GSM8K", options.gsm8k, "main", gsm8k_pair),
                ("MATH", options.math, "default", math_pair),
            )
            if source is not None
        ]
        if not sources:
            raise InputError("--gsm8k and --math are both missing, expected one or both; name a data set")
        for name, source, configuration, make in sources:
            for row in load_pairs(source, name=configuration, split=options.split):
                try:
                    made, kind = make(row, options.seed)
                    rows.append(made)
                    kinds.append(kind)
                except Unfit as reason:
                    dropped.append(f"{name}, {reason}")
        write(rows, count(dropped), options.output, options.sft)
        print("errors: " + ", ".join(f"{kind}: {number}" for kind, number in sorted(count(kinds).items())))
    except PlotAlignError as error:
        print(f"logic.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
