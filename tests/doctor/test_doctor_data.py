"""Planted faults: for each check a data set with that fault, found, and a clean one, silent."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from plot_align.doctor import Finding, diagnose
from plot_align.doctor.findings import CHECKS
from plot_align.errors import InputError
from plot_align.preference.dialogues import as_conversations
from plot_align.preference.estimation import estimate, load_pairs

PLANTED = range(40, 50)  # ten of two hundred rows
CYRILLIC = "привет дом река дерево окно стол дорога рука птица зима"


def found(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> dict[str, Finding]:
    diagnosis = diagnose(Dataset.from_list(rows), tokenizer, progress=False, **options)
    return {finding.check: finding for finding in diagnosis.examination.findings}


def test_a_clean_set_is_silent(clean, tokenizer):
    diagnosis = diagnose(Dataset.from_list(clean), tokenizer, progress=False)
    assert diagnosis.examination.findings == []
    assert [advice.sentence for advice in diagnosis.verdict] == ["Nothing wrong was found."]
    assert (diagnosis.examination.rows, diagnosis.examination.pairs) == (200, 200)


def test_clean_conversations_are_silent(chat, chat_tokenizer):
    assert found(chat, chat_tokenizer) == {}


def test_a_template_may_end_a_turn_with_a_line_break(chat, chat_tokenizer):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("'<|end|>'", "'<|end|>\\n'")
    assert found(chat, chat_tokenizer) == {}


# --- one pair at a time ---------------------------------------------------------------------------------------------


def _twice(row: dict[str, str], end: str) -> None:
    row["chosen"] += end


def _nearly(row: dict[str, str]) -> None:
    row["rejected"] = row["chosen"].rsplit(" ", 1)[0] + " moon"


def _long(row: dict[str, str]) -> None:
    row["chosen"] += " bread" * 300
    row["rejected"] += " music" * 300


def _late(row: dict[str, str]) -> None:
    shared = " stone cloud" * 100
    row["chosen"], row["rejected"] = shared + row["chosen"] * 8, shared + row["rejected"] * 8


def _moved_space(row: dict[str, str]) -> None:
    row["prompt"] += " "
    row["chosen"], row["rejected"] = " the" + row["chosen"], " the" + row["rejected"]
    row["chosen"], row["rejected"] = row["chosen"].lstrip(), row["rejected"].lstrip()


def _russian(*sides: str) -> Callable[[dict[str, str]], None]:
    def plant(row: dict[str, str]) -> None:
        for index, side in enumerate(sides):
            words = CYRILLIC.split()[index::2] * 2
            random.Random(row["prompt"]).shuffle(words)
            row[side] = " " + " ".join(words)

    return plant


SINGLE = {
    "no-pair": (lambda row: row.update(rejected=None), {"no-pair"}),
    "empty": (lambda row: row.update(chosen=""), {"empty"}),
    "identical": (lambda row: row.update(rejected=row["chosen"]), {"identical"}),
    "near-identical": (_nearly, {"near-identical"}),
    "truncated": (_long, {"truncated"}),
    "difference-lost": (_late, {"truncated", "difference-lost"}),
    "eos-doubled": (lambda row: _twice(row, "<eos> "), {"eos-doubled"}),
    "border": (_moved_space, {"border"}),
    "scripts": (_russian("rejected"), {"scripts", "languages"}),
    "languages": (_russian("chosen", "rejected"), {"languages"}),
}


@pytest.mark.parametrize("check", SINGLE)
def test_a_planted_fault_is_found_and_nothing_else(check, clean, tokenizer):
    plant, expected = SINGLE[check]
    for row in PLANTED:
        plant(clean[row])
    findings = found(clean, tokenizer, max_length=400)
    assert set(findings) == expected
    finding = findings[check]
    if check == "languages":  # of answers, and without rows
        assert (finding.count, finding.share) == (20, 0.05)
    else:
        assert (finding.count, finding.share) == (10, 0.05)
        assert finding.rows == [40, 41, 42, 43, 44]
    assert finding.severity == CHECKS[check].severity(0.05)
    assert finding.remedy
    assert finding.source


def test_eos_that_the_template_does_not_write_is_missed(chat, chat_tokenizer):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "message['content'] + '<|end|>'", "message['content']"
    )
    findings = found(chat, chat_tokenizer)
    assert set(findings) == {"eos-missing"}
    assert (findings["eos-missing"].count, findings["eos-missing"].severity) == (200, "error")


def test_another_end_than_eos_is_noted(chat, chat_tokenizer):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("'<|end|>'", "'<|system|>\\n'")
    findings = found(chat, chat_tokenizer)
    assert set(findings) == {"eos-other"}
    assert (findings["eos-other"].count, findings["eos-other"].severity) == (200, "note")


@pytest.mark.parametrize(
    ("content", "count"),
    [("message['content'][:8]", 200), ("(message['content'] if message['role'] == 'user' else 'yes')", 200)],
    ids=["cuts", "drops"],
)
def test_a_template_that_loses_text_is_found(chat, chat_tokenizer, content, count):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("message['content']", content)
    findings = found(chat, chat_tokenizer)
    assert findings["template"].count == count
    assert findings["template"].severity == "error"
    assert "eos-missing" not in findings


def test_a_template_that_drops_one_answer_is_found_wherever_it_is(chat, chat_tokenizer):
    """Row 210 is past the rows that are decoded again: its answers, one token apart, come out equal."""
    chat = chat + [json.loads(json.dumps(row)) for row in chat[:20]]
    for number, row in enumerate(chat[200:]):
        row["prompt"][0]["content"] += f" really {number} ?"
    chat[210]["chosen"][0]["content"] = "unlike yes"
    chat[210]["rejected"][0]["content"] = "unlike no, I do not think so and would rather not say"
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "message['content']", "(message['content'][:6] if message['content'][:6] == 'unlike' else message['content'])"
    )
    assert found(chat, chat_tokenizer)["template"].rows == [210]


def test_a_pair_that_trl_drops_for_its_prompt_is_found(clean, tokenizer):
    for row in PLANTED:
        clean[row]["prompt"] = "what is" + " the sum of three" * 100 + f" {row} ?"
    findings = found(clean, tokenizer, max_length=300)
    assert set(findings) == {"truncated", "difference-lost"}
    assert findings["difference-lost"].rows == [40, 41, 42, 43, 44]


# --- answers of several messages, and calls of tools ----------------------------------------------------------------


def _turns(row: dict[str, Any]) -> None:
    """Answers that go on: the user says something more, and is answered again."""
    for side in ("chosen", "rejected"):
        first = row[side][0]["content"]
        words = first.split()
        row[side] += [{"role": "user", "content": words[3]}, {"role": "assistant", "content": " ".join(words[::-1])}]


def test_answers_of_several_turns_are_silent(chat, chat_tokenizer):
    for row in chat:
        _turns(row)
    assert found(chat, chat_tokenizer) == {}


@pytest.mark.parametrize(
    "content", ["(message['content'] if loop.index != 3 else '')", "(message['content'] if loop.last else '')"]
)
def test_a_template_that_loses_a_turn_of_the_answer_is_found(chat, chat_tokenizer, content):
    for row in chat:
        _turns(row)
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("message['content']", content)
    assert found(chat, chat_tokenizer)["template"].count == 200


def test_a_clean_set_of_tool_calls_is_silent(calling, calling_tokenizer):
    assert found(calling, calling_tokenizer) == {}


def test_a_call_against_a_text_is_silent(calling, calling_tokenizer):
    """In either order; and in Russian, of which the JSON of a call is no part."""
    for number, row in enumerate(calling):
        text = {"prompt": str(number)}
        _russian("answer")(text)
        row[("chosen", "rejected")[number % 2]] = [{"role": "assistant", "content": text["answer"]}]
    findings = found(calling, calling_tokenizer)
    assert not {"empty", "identical", "near-identical", "template", "scripts", "languages"} & set(findings)


def test_a_template_that_drops_the_calls_is_found(calling, chat, chat_tokenizer):
    """Where both answers are calls, nothing is left of either; where one is, the other is."""
    for row, said in zip(calling[:100], chat, strict=False):
        row["rejected"] = said["rejected"]
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "message['content']", "(message['content'] or '')"
    )
    assert found(calling, chat_tokenizer)["template"].count == 200


def test_equal_calls_are_found(calling, calling_tokenizer):
    """Whatever their ids, which the template does not write."""
    for row in PLANTED:
        (message,) = calling[row]["chosen"]
        calling[row]["rejected"] = [dict(message, tool_calls=[dict(message["tool_calls"][0], id="another")])]
    findings = found(calling, calling_tokenizer)
    assert set(findings) == {"identical"}
    assert (findings["identical"].count, findings["identical"].rows) == (10, [40, 41, 42, 43, 44])


def test_calls_are_repeated_only_with_the_same_tools(calling, calling_tokenizer):
    for row in PLANTED:
        calling[row + 100] = dict(calling[row])
    for row in range(140, 145):
        calling[row]["tools"] = calling[row]["tools"][:2]
    assert found(calling, calling_tokenizer)["duplicate"].rows == [145, 146, 147, 148, 149]


def test_answers_that_differ_in_their_reasoning_alone_are_not_identical(chat, calling_tokenizer):
    for row in PLANTED:
        reasoned = [{**chat[row]["chosen"][0], "reasoning": text} for text in ("red blue.", "house tree.")]
        chat[row].update(chosen=reasoned[:1], rejected=reasoned[1:])
    assert found(chat, calling_tokenizer) == {}


# --- many pairs together --------------------------------------------------------------------------------------------


def test_duplicates_are_found(clean, tokenizer):
    for row in PLANTED:
        clean[row + 100] = dict(clean[row], chosen=clean[row]["chosen"] + " ")  # white space aside
    findings = found(clean, tokenizer)
    assert set(findings) == {"duplicate"}
    assert (findings["duplicate"].count, findings["duplicate"].rows) == (10, [140, 141, 142, 143, 144])


def test_contradictory_pairs_are_found(clean, tokenizer):
    for row in PLANTED:
        clean[row + 100] = dict(clean[row], chosen=clean[row]["rejected"], rejected=clean[row]["chosen"])
    findings = found(clean, tokenizer)
    assert set(findings) == {"contradictory"}
    assert (findings["contradictory"].count, findings["contradictory"].rows) == (10, [140, 141, 142, 143, 144])
    assert "drop" in findings["contradictory"].remedy.lower()


def test_the_same_answers_to_another_prompt_contradict_nothing(clean, tokenizer):
    for row in PLANTED:
        clean[row + 100].update(chosen=clean[row]["rejected"], rejected=clean[row]["chosen"])
    assert found(clean, tokenizer) == {}


def test_a_length_bias_is_found(clean, tokenizer):
    for row in clean[:150]:
        row["chosen"] += " bread music light water paper garden winter summer"
    findings = found(clean, tokenizer)
    assert set(findings) == {"length"}
    assert findings["length"].severity == "warning"
    assert findings["length"].share > 0.75


def test_first_words_that_give_the_label_away_are_found(clean, tokenizer):
    for row in clean[:160]:
        row["chosen"], row["rejected"] = " gladly" + row["chosen"], " alone" + row["rejected"]
    findings = found(clean, tokenizer)
    assert set(findings) == {"first-words"}
    assert findings["first-words"].severity == "warning"
    assert findings["first-words"].share > 0.8


@pytest.mark.parametrize(
    ("side", "other", "check"), [("chosen", "rejected", "refusals"), ("rejected", "chosen", "never-refuses")]
)
def test_refusals_of_one_side_are_found(clean, tokenizer, side, other, check):
    """In the middle of the answer's beginning, so that its first five words say nothing."""
    for row in clean[:100]:
        words = row[side].split()
        row[side] = " " + " ".join([*words[:6], "I cannot", *words[8:]])
    findings = found(clean, tokenizer)
    assert set(findings) == {check}
    assert (findings[check].count, findings[check].rows) == (100, [0, 1, 2, 3, 4])


def test_prompts_of_a_benchmark_are_found(clean, tokenizer, tmp_path):
    words = "a question of fourteen words that has its middle part in common with another prompt"
    clean[7]["prompt"] = f"please answer {words} at once"
    (tmp_path / "bench.jsonl").write_text(
        json.dumps({"question": "What is 3, plus 4?!"}) + "\n" + json.dumps({"question": words}) + "\n"
    )
    (tmp_path / "bench.txt").write_text("what is 5 plus 6 ?\n\n")
    findings = found(clean, tokenizer, overlap=tmp_path / "bench.jsonl")
    assert set(findings) == {"overlap"}
    assert findings["overlap"].rows == [3, 7]
    assert found(clean, tokenizer, overlap=tmp_path / "bench.txt")["overlap"].rows == [5]
    (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"has the columns id, expected one of prompt, question"):
        found(clean, tokenizer, overlap=tmp_path / "other.jsonl")


# --- reading --------------------------------------------------------------------------------------------------------


def _dialogue(row: dict[str, str], side: str) -> str:
    return f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}"


def test_raw_dialogues_are_noted_and_read_as_dialogues(clean, tokenizer):
    rows = [{side: _dialogue(row, side) for side in ("chosen", "rejected")} for row in clean]
    rows[3]["chosen"] = rows[3]["rejected"]
    findings = found(rows, tokenizer)
    assert set(findings) == {"raw-dialogue", "border", "identical"}  # the cut falls within words as well
    assert findings["raw-dialogue"].severity == "note"
    assert findings["identical"].rows == [3]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("streaming", [False, True])
def test_batches_and_streams_give_the_same(clean, tokenizer, tmp_path, batch_size, streaming):
    for row, value in ((0, None), (1, None), (60, None)):
        clean[row]["rejected"] = value
    data = Dataset.from_list(clean)
    expected = diagnose(data, tokenizer, progress=False).to_dict()
    given = data.to_iterable_dataset() if streaming else data
    got = diagnose(given, tokenizer, batch_size=batch_size, progress=False).to_dict()
    assert {**got, "seconds": 0} == {**expected, "seconds": 0}
    assert got["rows"] == 200
    assert got["pairs"] == 197
    assert [text.partition(":")[0] for text in got["refused"]] == ["row 0", "row 1", "row 60"]


def test_a_row_of_rubbish_is_named_and_skipped_or_refused(clean, tokenizer, tmp_path):
    """A line that is no JSON, one that is no object, one whose answer is a number, among two hundred."""
    lines = [json.dumps(row) for row in clean]
    lines[11:11] = ["{rubbish"]
    lines[50:50] = ["[1, 2]", '{"prompt": "x", "chosen": 5, "rejected": "y"}']
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    diagnosis = diagnose(path, tokenizer, progress=False)
    assert (diagnosis.examination.rows, diagnosis.examination.pairs) == (203, 200)
    assert [finding.rows for finding in diagnosis.examination.findings] == [[11, 50, 51]]
    broken, no_object, number = diagnosis.examination.refused
    assert broken.startswith("row 11: line 12 is no valid JSON (Expecting property name")
    assert no_object == "row 50: line 51 is a list of length 2, expected an object with chosen and rejected"
    assert "row 51: 'chosen' is 5, expected a string" in number
    with pytest.raises(InputError, match=r"^data row 11: line 12 is no valid JSON"):
        diagnose(path, tokenizer, strict=True, progress=False)


def test_a_damaged_first_line_is_named_too(clean, tokenizer, tmp_path):
    """Rows do not count blank lines, lines do."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n{rubbish\n" + "\n".join(json.dumps(row) for row in clean))
    (refused,) = diagnose(path, tokenizer, progress=False).examination.refused
    assert refused.startswith("row 0: line 2 is no valid JSON")
    path.write_text("null\n" + "\n".join(json.dumps(row) for row in clean))
    (refused,) = diagnose(path, tokenizer, progress=False).examination.refused
    assert refused == "row 0: line 1 is null, expected an object with chosen and rejected"
    good = "\n".join(json.dumps(row) for row in clean).encode()
    path.write_bytes(good + b'\n{"prompt": "a", "chosen": "b\xff", "rejected": "c"}\n')
    (refused,) = diagnose(path, tokenizer, progress=False).examination.refused
    assert refused == "row 200: line 201 is no UTF-8"


def test_a_byte_order_mark_is_no_damage(clean, tokenizer, tmp_path):
    """Alone, and before lines of which the last is rubbish."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in clean), encoding="utf-8")
    assert diagnose(path, tokenizer, progress=False).examination.refused == []
    path.write_text(path.read_text(encoding="utf-8") + "\n{rubbish\n", encoding="utf-8")
    examined = diagnose(path, tokenizer, progress=False).examination
    assert [text.partition(" is")[0] for text in examined.refused] == ["row 200: line 201"]
    assert examined.pairs == 200


@pytest.mark.parametrize("content", ["cut off", "no gzip", "empty"])
def test_a_file_without_a_damaged_line_is_refused_as_everywhere(content, clean, tokenizer, tmp_path):
    """Reading it line by line would hide what is wrong, or end in the midst of it."""
    path = tmp_path / "pairs.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in clean).encode())
    path.write_bytes(
        {"cut off": whole[: len(whole) // 2], "no gzip": b"no gzip", "empty": gzip.compress(b"")}[content]
    )
    with pytest.raises(InputError) as expected:
        load_pairs(path)
    with pytest.raises(InputError) as refused:
        diagnose(path, tokenizer, progress=False)
    assert str(refused.value) == str(expected.value)
    assert "streaming" not in str(refused.value)


@pytest.mark.parametrize(("column", "refused"), [("chosen", ["row 200"]), ("score", None)])
def test_a_value_of_another_type_is_damage_in_an_answer_alone(
    column, refused, clean, tokenizer, tmp_path, monkeypatch
):
    """Some versions of Arrow's reader stop at one."""

    def stops(source: Any, **options: Any) -> Any:
        raise InputError("a column changed from string to number")

    monkeypatch.setattr("plot_align.doctor.pairs.load_pairs", stops)
    rows = [{**row, "score": "high"} for row in clean]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {**rows[0], column: 5}]))
    if refused is None:
        with pytest.raises(InputError, match="changed from string to number"):
            diagnose(path, tokenizer, progress=False)
    else:
        found_there = diagnose(path, tokenizer, progress=False).examination.refused
        assert [text.partition(":")[0] for text in found_there] == refused


def test_a_configuration_of_a_file_is_refused(clean, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in clean))
    for local in (path, tmp_path):
        with pytest.raises(InputError, match=r"^name is 'nonsense', but .* only data sets of the Hub have"):
            diagnose(local, tokenizer, name="nonsense", progress=False)


def test_what_is_no_set_of_pairs_is_refused(tokenizer):
    with pytest.raises(InputError, match="no column 'chosen' and no column 'rejected'"):
        found([{"a": "x"}], tokenizer)
    with pytest.raises(InputError, match="none of the 2 rows is a pair"):
        found([{"chosen": "a", "rejected": None}] * 2, tokenizer)
    with pytest.raises(InputError, match="a column 'label' instead"):
        found([{"prompt": "a", "completion": "b", "label": True}], tokenizer)
    with pytest.raises(InputError, match="model_or_tokenizer is a int"):
        found([{"chosen": "a", "rejected": "b"}], 3)


def test_one_pair_is_enough(tokenizer):
    diagnosis = diagnose(
        Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]), tokenizer, progress=False
    )
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))["pairs"] == 1
    assert "1 pair of" in diagnosis.as_text()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_few_pairs_that_all_go_one_way_are_silent(clean, tokenizer, number, side):
    """One side is longer, begins alike and refuses, in each of them."""
    rows = clean[:number]
    for row in rows:
        row[side] = " I cannot" + row[side] + row[side]
    assert found(rows, tokenizer) == {}


# --- what PLOT would train ------------------------------------------------------------------------------------------


def test_the_preference_is_that_of_estimate(clean, tokenizer):
    for row in clean[:100]:
        row["chosen"] += " gladly !"
    data = Dataset.from_list(clean)
    counted = estimate(data, tokenizer, progress=False)
    preference = diagnose(data, tokenizer, progress=False).examination.preference
    difference = counted.difference()
    assert preference["preferred"][0]["id"] == int(difference.argmax())
    assert preference["preferred"][0]["difference"] == pytest.approx(float(difference.max()))
    assert preference["distance"] == pytest.approx(float(difference.abs().sum()) / 2)
    clear = counted.confidence().abs() >= 1.96
    assert preference["certain"] == pytest.approx(
        float(difference[clear].abs().sum() / difference.abs().sum()), rel=1e-3
    )
    assert sum(preference["mass"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind"),
    [
        (" red !!!!!!!!", " red", "format"),
        (" red", " red blue red blue red blue red blue", "length"),  # only EOS is commoner where answers are short
    ],
)
def test_what_is_no_content_is_named(chosen, rejected, kind, tokenizer):
    rows = [{"prompt": f"{row} ?", "chosen": chosen, "rejected": rejected} for row in range(50)]
    preference = diagnose(Dataset.from_list(rows), tokenizer, progress=False).examination.preference
    assert kind in {token["kind"] for token in preference["preferred"]}
    assert preference["mass"][kind] > 0.2
    assert preference["mass"]["refusal"] == 0


# --- real data ------------------------------------------------------------------------------------------------------


def test_false_alarms_on_real_pairs(real_data, chat_tokenizer):
    """docs/doctor.md: on HH-RLHF, as conversations, no check of the texts finds anything that is not there.

    Conversion leaves out the rows with an empty answer. The tiny tokenizer needs more tokens than a real one, so
    nothing is truncated here.
    """
    data = as_conversations(load_pairs(real_data / "hh_rlhf_harmless_2000.jsonl.gz").select(range(400)))
    diagnosis = diagnose(data, chat_tokenizer, max_length=None, progress=False)
    assert diagnosis.examination.findings == []
    assert diagnosis.verdict[0].rule == "nothing"
