"""The recipes: every file's keys, the data they train on, and each run.sh from its first command to its last."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.config import PlotAblations, PlotConfig
from plot_align.preference import dialogues
from plot_align.preference.datasets import load_pairs
from plot_align.trl.artifacts import thinned

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FAMILIES = ("llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b")
COMMANDS = {"sft": "sft", "dpo": "dpo", "aot": "dpo", "pro": "pro"}
NAMES = [f"{data}-{method}" for data in ("hh", "logic") for method in COMMANDS]


def load(path: str) -> ModuleType:
    """A script of the recipes as a module."""
    sys.path.insert(0, str((RECIPES / path).parent))
    try:
        spec: Any = importlib.util.spec_from_file_location(f"recipes_{Path(path).stem}", RECIPES / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str((RECIPES / path).parent))


rehearse, hh, logic = load("rehearse.py"), load("data/hh_rlhf.py"), load("data/logic.py")


def options(family: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / family / f"{name}.yaml").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- run.sh


@pytest.mark.slow
def test_rehearsal(monkeypatch, capfd):
    """All families take the same steps; most other tests have a Llama."""

    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # so that what the rehearsal sets is taken back
    code = rehearse.main(["qwen2.5-7b"])
    assert code == 0, capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "HARMBENCH is not set"), (["--dry"], "unknown option --dry")], ids=["unset", "option"]
)
def test_script_refuses_in_one_sentence(arguments, said):
    environment = {key: value for key, value in os.environ.items() if key != "HARMBENCH"}
    script = RECIPES / FAMILIES[0] / "run.sh"
    done = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ends_of_grid():
    words = ["sweep", "--train", "a.yaml", "--alpha", "1", "2", "3", "--divergence", "w1", "kl", "--output", "o"]
    kept = ["sweep", "--train", "a.yaml", "--alpha", "1", "3", "--divergence", "w1", "kl", "--output", "o"]
    assert rehearse.ends_of_grid(words) == kept


# ---------------------------------------------------------------------------------------------- YAML


def test_sixteen_files_a_family():
    wanted = {f"{name}{plot}.yaml" for name in NAMES for plot in ("", "-plot")}
    for family in FAMILIES:
        assert {path.name for path in (RECIPES / family).glob("*.yaml")} == wanted


@pytest.mark.parametrize("method", COMMANDS)
def test_every_file_is_parsed(method):
    """As `plot-align METHOD --config FILE` does, and nothing is left for the launcher."""
    from plot_align.cli.options import make_parser, parse

    for family, data, plot in itertools.product(FAMILIES, ("hh", "logic"), ("", "-plot")):
        name = f"{data}-{method}{plot}"
        given = options(family, name)
        (_, training, *_, term, _), launcher = parse(make_parser(COMMANDS[method]), dict(given), ["--use_cpu"], name)
        assert training.output_dir == given["output_dir"]
        assert term.alpha == given["alpha"]
        assert launcher.config == {}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_its_files(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES.parent / "src" / "plot_align" / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_only_the_term_tells_plot_from_none(family, name):
    plain, plot = options(family, name), options(family, f"{name}-plot")
    term = {*PlotConfig.__dataclass_fields__, *PlotAblations.__dataclass_fields__}
    assert plain.pop("alpha") == 0
    assert (plain.pop("output_dir"), plot.pop("output_dir")) == (f"runs/{family}/{name}", f"runs/{family}/{name}-plot")
    found = {key: plot.pop(key) for key in term & plot.keys()}
    assert plain == plot
    assert PlotConfig.from_options(**found) == PlotConfig.paper()


@pytest.mark.parametrize("name", [f"{name}{plot}" for name in NAMES for plot in ("", "-plot")])
def test_families_agree(name):
    """But for the model, its chat format, the dtype that fits, and paths."""
    own = ("model_name_or_path", "chat_template_path", "eos_token")

    def shared(family: str) -> dict[str, Any]:
        found = {key: value for key, value in options(family, name).items() if key not in own}
        if "sft" in name:
            del found["dtype"]
        return {key: str(value).replace(family, "FAMILY") for key, value in found.items()}

    assert shared(FAMILIES[0]) == shared(FAMILIES[1]) == shared(FAMILIES[2])


def test_suite_is_the_papers_on_other_data():
    from importlib import resources

    ours = yaml.safe_load((RECIPES / "suite.yaml").read_text(encoding="utf-8"))
    papers = yaml.safe_load((resources.files("plot_align.evaluation") / "suites" / "paper.yaml").read_text())
    assert ours["reasoning"].pop("logic_pairs")
    data = ("pairs", "split", "skip_copyright")

    def plain(suite: dict[str, Any]) -> dict[str, Any]:
        return {
            section: {
                name: {key: value for key, value in spec.items() if key not in data} for name, spec in measures.items()
            }
            for section, measures in suite.items()
        }

    assert plain(ours) == plain(papers)


# ---------------------------------------------------------------------------------------------- HH-RLHF


def dialogue(*turns: str) -> str:
    speakers = itertools.cycle(("Human", "Assistant"))
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in zip(speakers, turns, strict=False))


def after_hashes(text: str) -> str:
    """GSM8K's answer; empty where there is none."""
    return text.rpartition("####")[2].strip() if "####" in text else ""


def test_dialogue_becomes_a_pair():
    found = dialogues.convert(dialogue("Hi", "Hello", "More?", "Yes"), dialogue("Hi", "Hello", "More?", " No\n"))
    assert found == {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "More?"},
        ],
        "chosen": [{"role": "assistant", "content": "Yes"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Hi", dialogue("Hi", "a"), "does not begin"),
        ("", dialogue("Hi", "a"), "does not begin"),
        ("\n\nAssistant: Hi", dialogue("Hi", "a"), "does not begin"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", dialogue("Hi", "a"), "do not alternate"),
        (dialogue("Hi", "a", "b"), dialogue("Hi", "a"), "does not end with an answer"),
        (dialogue("Hi", " "), dialogue("Hi", "a"), "an empty turn"),
        (dialogue("Hi", "a"), dialogue("Ho", "b"), "differ before"),
        (dialogue("Hi", "a"), dialogue("Hi", "a "), "are equal"),
    ],
)
def test_malformed_dialogue_is_dropped(chosen, rejected, reason):
    with pytest.raises(dialogues.Malformed, match=reason):
        dialogues.convert(chosen, rejected)


_TEXT = st.text(min_size=1).filter(lambda text: text.strip() and not re.search("Human:|Assistant:", text))


@given(st.lists(_TEXT, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
@settings(max_examples=100, deadline=None)
def test_turns_come_back(texts):
    found = dialogues.turns(dialogue(*texts))
    assert [turn["content"] for turn in found] == [text.strip() for text in texts]


@given(st.text(alphabet="\nHumanAssist: x"))
@settings(max_examples=200, deadline=None)
def test_any_text_is_turns_or_malformed(text):
    try:
        found = dialogues.turns(text)
    except dialogues.Malformed:
        return
    assert [turn["role"] for turn in found] == ["user", "assistant"] * (len(found) // 2)


def test_real_dialogues(real_data, tmp_path, capsys):
    source = real_data / "hh_rlhf_harmless_2000.jsonl.gz"
    assert hh.main([str(source), "--output", str(tmp_path / "o.jsonl"), "--sft", str(tmp_path / "s.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    raw = {row["chosen"]: row["rejected"] for row in load_pairs(source)}
    assert len(rows) == 1990
    assert "dropped: an empty turn: 3, turns do not alternate: 7" in capsys.readouterr().out

    def squeezed(text: str) -> str:
        return "".join(text.split())

    known = {squeezed(chosen): squeezed(rejected) for chosen, rejected in raw.items()}
    for row in rows:
        chosen, rejected = (
            squeezed(dialogue(*(turn["content"] for turn in row["prompt"] + row[side])))
            for side in ("chosen", "rejected")
        )
        assert known[chosen] == rejected
    assert [json.loads(line)["completion"] for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines()] == [
        row["chosen"] for row in rows
    ]


@pytest.mark.parametrize("script", ["hh", "logic"])
def test_missing_data_is_one_sentence(script, tmp_path, capsys):
    missing = str(tmp_path / "missing.jsonl")
    out = ["--output", str(tmp_path / "o.jsonl")]
    code = hh.main([missing, *out]) if script == "hh" else logic.main(["--gsm8k", missing, *out])
    assert code == 2
    assert "does not exist; check the path" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- GSM8K and MATH

QUESTION = "A shop has 12 boxes of 30 pens. It sells 45 pens. Ann and 4 friends share what is left."
SOLUTION = (
    "It has 12*30 = <<12*30=360>>360 pens.\n"
    "Then $360 - 45 = <<360-45=315>>315 are left.\n"
    "Each gets 315/5=<<315/5=63>>63.\n"
    "#### 63"
)
EXPECTED = {  # worked out by hand: (kind, line) → (the solution's lines after it, without annotations)
    ("off_by_one", 1): {"Then $360 - 45 = 316 are left.", "Then $360 - 45 = 314 are left."},
    ("lost_carry", 1): {
        "Then $360 - 45 = 325 are left.\nEach gets 325/5=65.\n#### 65",
        "Then $360 - 45 = 305 are left.\nEach gets 305/5=61.\n#### 61",
    },
    ("swapped_operation", 1): {"Then $360 + 45 = 405 are left.\nEach gets 405/5=81.\n#### 81"},
    ("dropped_step", 1): {"Each gets 360/5=72.\n#### 72"},
}


def errors(question: str, solution: str, seeds: int = 150) -> dict[tuple[str, int], set[str]]:
    """(kind, line) → the solutions with that error, over many seeds."""
    found: dict[tuple[str, int], set[str]] = {}
    for seed in range(seeds):
        made = logic.corrupt_gsm8k(question, solution, seed)
        found.setdefault((made.kind, made.line), set()).add(logic.without_annotations(made.text))
    return found


def test_errors_by_hand():
    found = errors(QUESTION, SOLUTION)
    first = "It has 12*30 = 360 pens.\n"
    # 316/5 and 314/5 are no whole numbers of pens, and so no error of that kind is made there.
    assert ("off_by_one", 1) not in found
    for place in (("lost_carry", 1), ("swapped_operation", 1), ("dropped_step", 1)):
        assert found[place] == {first + rest for rest in EXPECTED[place]}
    assert found["off_by_one", 2] == {
        f"{first}Then $360 - 45 = 315 are left.\nEach gets 315/5={answer}.\n#### {answer}" for answer in (62, 64)
    }
    assert {kind for kind, _ in found} == set(logic.KINDS)


def test_a_number_of_the_question_is_not_the_place_of_an_error():
    """The result 12 would take the question's 12 with it, wherever that comes again."""
    question = "Ann has 12 hats, of 2 kinds, 6 of each. She buys 5 more hats of each kind."
    solution = "She has 2*6=<<2*6=12>>12.\nShe buys 2*5=<<2*5=10>>10.\nThat makes 12+10=<<12+10=22>>22.\n#### 22"
    assert 0 not in {line for kind, line in errors(question, solution)}


@pytest.mark.parametrize(
    "solution", ["Nothing to add.\n#### 7", "It is <<50%*4=2>>2.\n#### 2", "<<1+1=2>>2\n#### two"]
)
def test_no_error_fits(solution):
    with pytest.raises(logic.Unfit):
        logic.corrupt_gsm8k("How many?", solution)


@given(st.recursive(
    st.integers(0, 999).map(str) | st.sampled_from([".5", "0.25", "1,200", "08"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=6,
))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_evaluate_is_exact_arithmetic(expression):
    def numbers_as_fractions(text: str) -> str:
        return re.sub(r"[\d.,]+", lambda found: f"Fraction('{found[0].replace(',', '')}')", text)

    try:
        expected = eval(numbers_as_fractions(expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(logic.Unfit):
            logic.evaluate(expression)
        return
    assert logic.evaluate(expression) == expected


@pytest.mark.parametrize("text", ["", "2 +", "2**3", "f(2)", "50%*4", "'a'", "[1]", "1 if 2 else 3", "(" * 300])
def test_evaluate_refuses_the_rest(text):
    with pytest.raises(logic.Unfit):
        logic.evaluate(text)


def test_real_solutions(real_data):
    """Independent of the script's own arithmetic: floats, and the annotations as Python reads them."""

    def wrong_lines(text: str) -> int:
        wrong = 0
        for expression, result in re.findall(r"<<([^<>=]*)=([^<>]*)>>", text):
            try:
                made = eval(re.sub(r"(?<![\d.])0+(?=\d)", "", expression.replace(",", "")), {})
                wrong += abs(made - float(result.replace(",", ""))) > 1e-6
            except (SyntaxError, ValueError, TypeError):
                wrong += 1
        return wrong

    kinds: Counter[str] = Counter()
    rows = list(load_pairs(real_data / "gsm8k_train.jsonl.gz"))
    for row in rows[:2500]:
        right = row["answer"].split("#### ")[1].replace(",", "")
        try:
            corrupted = logic.corrupt_gsm8k(row["question"], row["answer"])
        except logic.Unfit:
            continue
        made, kind = logic.gsm8k_pair(row, 0)
        kinds[kind] += 1
        chosen, rejected = made["chosen"][0]["content"], made["rejected"][0]["content"]
        assert made["prompt"] == [{"role": "user", "content": row["question"]}]
        assert after_hashes(chosen).replace(",", "") == right
        wrong = after_hashes(rejected).replace(",", "")
        assert re.fullmatch(r"\d+(\.\d\d?)?", wrong)
        assert float(wrong) != float(right)
        assert "." not in wrong or "." in right
        assert rejected == re.sub("<<.*?>>", "", corrupted.text)
        assert "<<" not in chosen + rejected
        # The error itself is the one calculation that is wrong; swapped or dropped, none is.
        slips = kind in ("off_by_one", "lost_carry")
        assert wrong_lines(corrupted.text) <= wrong_lines(row["answer"]) + slips
        lines = len(row["answer"].split("\n")) - (kind == "dropped_step")
        assert len(rejected.split("\n")) == lines
    assert kinds.total() > 0.9 * 2500
    assert min(kinds.values()) > 0.1 * kinds.total()
    assert set(kinds) == set(logic.KINDS)


PROBLEM = "Compute the value of $3 \\cdot 4 + 5$."
MATH = "We have $3 \\cdot 4 = 12$, so $12 + 5 = 17$. Doubling 17 is not asked for. It is $\\boxed{17}$."


def test_math_error_by_hand():
    found = {logic.corrupt_math(PROBLEM, MATH, seed).text for seed in range(40)}
    assert found == {MATH.replace("17", str(17 + step)) for step in (-2, -1, 1, 2)}


def test_math_error_in_the_box_where_the_problem_names_the_number():
    solution = "Clearly $x = 5$, so the answer is $\\boxed{\\frac{5}{7}}$."
    made = [logic.corrupt_math("Is it 5, or 7?", solution, seed) for seed in range(40)]
    assert {one.kind for one in made} == {"last_step"}
    assert all(one.text.startswith("Clearly $x = 5$, so the answer is $\\boxed{\\frac{") for one in made)
    assert {one.answer for one in made} == {
        f"\\frac{{{a}}}{{{b}}}" for a, b in [(3, 7), (4, 7), (6, 7), (7, 7), (5, 5), (5, 6), (5, 8), (5, 9)]
    }


@given(
    st.text(alphabet="x+=$ {}\\,.0123456789", max_size=30),
    st.text(alphabet="x+\\,.0123456789", max_size=8),
    st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_math_answer_always_changes(before, answer, seed):
    solution = f"{before} \\boxed{{{answer}}}$."
    try:
        made = logic.corrupt_math("What is it?", solution, seed)
    except logic.Unfit:
        return
    assert logic.math_answer(solution) == answer
    assert logic.math_answer(made.text) == made.answer != answer
    assert made.text.endswith("}$.")


@pytest.mark.parametrize("solution", ["no box 3", "$\\boxed{\\text{B}}$", "$\\boxed{3", "$\\boxed{}$"])
def test_math_without_a_number_is_dropped(solution):
    with pytest.raises(logic.Unfit):
        logic.corrupt_math("?", solution)


def test_seed_and_problem_decide(tmp_path):
    rows = [{"question": QUESTION + str(i), "answer": SOLUTION} for i in range(8)]
    source = tmp_path / "gsm8k.jsonl"

    def written(order: list[dict[str, str]], seed: int) -> list[str]:
        source.write_text("".join(json.dumps(row) + "\n" for row in order))
        output = tmp_path / "out.jsonl"
        assert logic.main(["--gsm8k", str(source), "--output", str(output), "--seed", str(seed)]) == 0
        return output.read_text().splitlines()

    once = written(rows, 0)
    assert len(once) == 8
    assert written(rows, 0) == once
    assert written(rows[::-1], 0) == once[::-1]
    assert written(rows, 1) != once


# ---------------------------------------------------------------------------------------------- the training record


@pytest.mark.parametrize(("n", "most"), [(0, 5), (5, 5), (6, 5), (1000, 7)])
def test_thinned_log(n, most):
    entries = [{"step": step} for step in range(n)]
    kept = thinned(entries, most)
    assert len(kept) == min(n, most)
    steps = [entry["step"] for entry in kept]
    assert steps == sorted(set(steps))
    if n:
        assert (steps[0], steps[-1]) == (0, n - 1)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1
