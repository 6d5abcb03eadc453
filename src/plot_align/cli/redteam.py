"""``plot-align redteam``: attack success rate and over-refusal of your own models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align.cli.launch import on_processes
from plot_align.cli.parser import Parser, add_loading_options, add_num_processes, named_models
from plot_align.errors import InputError, did_you_mean, require_packages
from plot_align.inference.load import check_dtype, load_model
from plot_align.io import digest, file_name, json_digest, plain_json, read_yaml
from plot_align.redteam.names import ATTACKS, DEFAULT_JUDGES, JUDGES, parse_judges, telling_refusals
from plot_align.text import printable, terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from plot_align.redteam.attack import Attack
    from plot_align.redteam.behaviors import Behavior
    from plot_align.redteam.spent import Limit
    from plot_align.redteam.victim import Victim

_FILES = ("behaviors", "benign", "targets", "options")  # a record has their digests
# Options that decide no number of a record, or that other files of the folder hold to one value.
_DECIDE_NOTHING = (
    *_FILES, "model", "compare", "output", "batch_size", "device", "dtype", "trust_remote_code", "inspect_logs",
    "attacker_key", "judge_key",
)  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(
        "redteam",
        "Attack your own model and measure how often it complies, with over-refusal of\n"
        "benign requests beside it. Files are HarmBench's; an interrupted run goes on\n"
        "where it stopped.",
        "  plot-align redteam my-model --behaviors behaviors.csv --targets targets.json \\\n"
        "    --benign benign.csv --attacks direct,gcg --compare my-model-with-plot",
    )
    parser.usage = "plot-align redteam MODEL --behaviors FILE [options]"
    parser.add_argument("model", metavar="MODEL", help="hub id or folder of a chat model, or NAME=MODEL")
    parser.add_argument("--compare", metavar="MODEL", help="a second model, with the same seed and budget")
    parser.add_argument(
        "--behaviors",
        required=True,
        metavar="FILE",
        help="HarmBench's, JailbreakBench's, StrongREJECT's, XSTest's .csv",
    )
    parser.add_argument("--benign", metavar="FILE", help="harmless requests, same forms (default: 60 of ours)")
    parser.add_argument(
        "--targets", metavar="FILE", help="HarmBench's targets, .json (default: the file's own, if any)"
    )
    parser.add_argument("--skip_copyright", action="store_true", help="leave copyright rows out instead of refusing")
    parser.add_argument(
        "--attacks", default="direct,gcg", metavar="A,B", help=f"of {', '.join(ATTACKS)} (%(default)s)"
    )
    parser.add_argument("--options", metavar="FILE", help="YAML: options of attacks, e.g. prefill: {tokens: 8}")
    parser.add_argument("--cases", type=int, metavar="N", help="test cases per behaviour (default: HarmBench's)")
    parser.add_argument("--snapshots", metavar="N,N", help="update steps of the curve, of attacks that have steps")
    parser.add_argument(
        "--max_forward_tokens", type=int, metavar="N", help="budget of a test case; begin no more once spent"
    )
    parser.add_argument("--max_seconds", type=float, metavar="S", help="the same in seconds")
    parser.add_argument("--transfer_from", metavar="NAME", help="replay the white-box cases made on this model")
    parser.add_argument("--attacker", metavar="MODEL", help="writes the prompts of zero_shot and sfs")
    parser.add_argument("--attacker_url", metavar="URL", help="the same behind an OpenAI-compatible endpoint")
    parser.add_argument("--attacker_key", default="OPENAI_API_KEY", metavar="VAR", help="holds its key (%(default)s)")
    parser.add_argument(
        "--judge", default=",".join(DEFAULT_JUDGES), metavar="A,B=DIR",
        help=f"the first decides (%(default)s); of {', '.join(JUDGES)}",
    )  # fmt: skip
    parser.add_argument("--harmbench", metavar="DIR", help="a checkout of HarmBench, for its classifier's prompts")
    parser.add_argument("--judge_url", metavar="URL", help="address for judges that ask a model, OpenAI-compatible")
    parser.add_argument("--judge_model", metavar="NAME", help="the name of its model")
    parser.add_argument("--judge_key", default="OPENAI_API_KEY", metavar="VAR", help="holds its key (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="answers a pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add_num_processes(parser)
    add_loading_options(parser)
    parser.add_argument("--inspect_logs", action="store_true", help="write logs for `inspect view` as well")
    parser.add_argument("--output", type=Path, default=Path("runs/redteam"), metavar="DIR", help="(%(default)s)")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, attack, judge, and write HarmBench's files, a record and a table."""
    options = make_parser().parse(arguments)
    num_processes = vars(options).pop("num_processes")  # it does not change results, so records leave it out
    return on_processes("redteam", num_processes, arguments, lambda: _run(options))


def _run(options: Any) -> int:
    require_packages("redteam", "matplotlib", extra="redteam")  # for the curves, drawn last
    if options.inspect_logs:
        require_packages("--inspect_logs", "inspect_ai", extra="inspect-ai")
    from plot_align.io import claimed
    from plot_align.parallel import on_main
    from plot_align.redteam.behaviors import default_benign, read_behaviors, read_targets, require_targets
    from plot_align.redteam.spent import Limit

    _check_judges(options)
    asked = read_behaviors(options.behaviors, skip_copyright=options.skip_copyright)
    harmful, skipped = asked.rows, asked.skipped
    harmless = None if options.benign is None else read_behaviors(options.benign, kind="harmless")
    benign = default_benign() if harmless is None else harmless.rows
    targets = asked.targets | ({} if options.targets is None else read_targets(options.targets))
    if "likelihood" in parse_judges(options.judge):
        if not targets:
            raise InputError("judge likelihood needs the targets; name their file with --targets")
        require_targets(harmful, targets, "judge likelihood")
    _check_addresses(options)
    check_dtype(options.dtype)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}, expected 1 or more")
    limit = Limit(options.max_forward_tokens, options.max_seconds)
    options.snapshots = _steps(options.snapshots)
    attacks = _attacks(options)
    for attack in attacks:
        if attack.on_answer and "likelihood" in parse_judges(options.judge):
            raise InputError(
                f"judge likelihood reads no answer, so {attack.title} would be a direct request to it; name another "
                "judge, or leave that attack out"
            )
        if attack.needs_target and not (options.transfer_from and attack.white_box):
            require_targets(harmful, targets, attack.name)

    taken = [asked.taken] + ([harmless.taken] if harmless else [])
    on_main(lambda: print("\n".join(printable(sentence) for sentence in taken)))
    models = named_models([options.model] + ([options.compare] if options.compare else []))
    loaded: dict[str, Any] = {}
    measured, identities = {}, {}
    with ExitStack() as held:
        on_main(lambda: held.enter_context(claimed(options.output)))
        for name, source in models.items():
            victim = load_victim(source, options, name)
            identities[name] = victim.identity
            measured[name] = _measured(victim, harmful, benign, targets, attacks, limit, options, loaded)
        on_main(lambda: _report(measured, identities, skipped, options))
        if options.inspect_logs:
            from plot_align.redteam.inspect_log import FOLDER, write_logs

            for name, found in measured.items():
                on_main(partial(write_logs, options.output, name, found, harmful, benign))
            on_main(lambda: print(printable(f"logs of Inspect: inspect view --log-dir {options.output / FOLDER}")))
    return 0


def load_victim(model: str, options: Any, name: str | None = None) -> Victim:
    """Load a chat model as a victim, named ``name`` or like its folder.

    Raises:
        InputError: it cannot be loaded, or has no chat template.
    """
    from plot_align.redteam.victim import Victim

    loaded = load_model(model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    return Victim(*loaded, name or Path(model).name)


def _steps(text: str | None) -> tuple[int, ...]:
    steps = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(step.isdecimal() and int(step) > 0 for step in steps):
        raise InputError(f"--snapshots is {text!r}, expected update steps such as 10,50,100")
    return tuple(sorted({int(step) for step in steps}))


def _attacks(options: Any) -> list[Attack]:
    """The chosen attacks, with the options of the YAML file.

    Raises:
        InputError: an unknown attack or option, or an attacker that is missing.
    """
    wanted = [name.strip() for name in options.attacks.split(",") if name.strip()]
    for name in wanted:
        if name not in ATTACKS:
            raise InputError(
                f"unknown attack {name!r}; {did_you_mean(name, ATTACKS, 'expected ' + ', '.join(ATTACKS))}"
            )
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"--attacks is {options.attacks!r}, expected attacks of {', '.join(ATTACKS)}, each once")
    given = {} if options.options is None else read_yaml(options.options, "--options")
    for name in given:
        if name not in ATTACKS or not isinstance(given[name], dict):
            advice = did_you_mean(str(name), ATTACKS, f"expected {', '.join(ATTACKS)}, each with its options")
            raise InputError(f"{name!r} in {options.options} is no attack with options; {advice}")
    return [_attack(name, given.get(name, {}), options) for name in wanted]


def _attack(name: str, given: dict[str, Any], options: Any) -> Attack:
    from plot_align.redteam.catalogue import attack_class, make_attack

    extra = {}
    if name in ("zero_shot", "sfs"):
        replayed = options.transfer_from and attack_class(name).white_box
        extra["attacker"] = None if replayed else _attacker(name, options)
    try:
        return make_attack(name, given, **extra)
    except InputError as error:  # attacks have options of one name
        raise InputError(f"{options.options}, {name}: {error}") from None


def _attacker(attack: str, options: Any) -> Any:
    from plot_align.redteam.attackers import EndpointAttacker, LocalAttacker

    if options.attacker is None:
        raise InputError(f"{attack} needs a model that writes its prompts; name one with --attacker")
    if options.attacker_url is not None:
        from plot_align.inference.endpoint import Endpoint

        return EndpointAttacker(Endpoint(options.attacker_url, options.attacker, options.attacker_key))
    loaded = load_victim(options.attacker, options)
    return LocalAttacker(loaded.model, loaded.tokenizer, loaded.name)


def _judges(
    wanted: dict[str, str | None], victim: Victim, targets: dict[str, str], options: Any, loaded: dict[str, Any]
) -> dict[str, Any]:
    """The judges by name. ``loaded`` keeps them for the next model, except the one that needs the victim.

    Raises:
        InputError: something that it needs is missing.
    """
    from plot_align.redteam.catalogue import make_judge
    from plot_align.redteam.judges import TargetLikelihood

    for name, checkpoint in wanted.items():
        if name != "likelihood" and name not in loaded:
            loaded[name] = make_judge(
                name,
                checkpoint=checkpoint,
                harmbench=options.harmbench,
                device=options.device,
                url=options.judge_url,
                model=options.judge_model,
                key_variable=options.judge_key,
            )
    return {name: TargetLikelihood(victim, targets) if name == "likelihood" else loaded[name] for name in wanted}


def _check_judges(options: Any) -> None:
    """Check that each judge has what it needs, before attacks that may take hours."""
    from plot_align.redteam.catalogue import require_judge

    for name in parse_judges(options.judge):
        require_judge(name, harmbench=options.harmbench, url=options.judge_url, model=options.judge_model)


def _check_addresses(options: Any) -> None:
    """Check endpoints, that their package is installed, and the variables of keys, which the record names."""
    from plot_align.inference.endpoint import check_key_variable

    for variable in (options.attacker_key, options.judge_key):  # also where nothing is asked
        check_key_variable(variable)
    if any(_addresses(options).values()):
        require_packages("an endpoint", "openai", extra="redteam")


def _measured(
    victim: Victim,
    harmful: list[Behavior],
    benign: list[Behavior],
    targets: dict[str, str],
    attacks: list[Attack],
    limit: Limit,
    options: Any,
    loaded: dict[str, Any],
) -> dict[str, Any]:
    """:func:`plot_align.redteam.measure.measure` under a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from plot_align.parallel import rank
    from plot_align.redteam.measure import Budget, Judges, measure

    wanted = parse_judges(options.judge)
    judges = Judges(*(_judges(of, victim, targets, options, loaded) for of in (wanted, telling_refusals(wanted))))
    budget = Budget(options.cases, options.seed, options.snapshots, options.max_new_tokens, options.batch_size, limit)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[update]}"),
    )  # fmt: skip
    with Progress(*columns, console=terminal(sys.stderr), disable=rank() > 0) as progress:
        return measure(
            victim,
            harmful,
            benign,
            targets,
            attacks,
            judges,
            budget,
            options.output,
            transfer_from=options.transfer_from,
            bar=lambda description, total: _bar(progress, f"{victim.name}: {description}", total),
        )


def _bar(progress: Progress, description: str, total: int) -> tuple[Callable[[str], None], Callable[[str, int], None]]:
    """A bar: one function advances it by a behaviour, the other shows the update step of the current attack."""
    task = progress.add_task(description, total=total, update="")

    def advance(behavior: str) -> None:
        progress.update(task, advance=1, update="")

    def update(behavior: str, step: int) -> None:
        progress.update(task, update=f"update {step}")

    return advance, update


def _report(
    measured: dict[str, dict[str, Any]], identities: dict[str, dict[str, str]], skipped: list[str], options: Any
) -> None:
    from rich.table import Table

    from plot_align.records import write_record
    from plot_align.redteam.catalogue import judge_rules
    from plot_align.redteam.measure import balance
    from plot_align.results import agreement_text
    from plot_align.statistics import holm, paired_difference, proportion

    console = terminal()
    first = next(iter(measured.values()))
    main, benign = (names[0] for names in first["judges"].values())
    judged = f"judged by {main}{'' if benign == main else f', benign requests by {benign}'}"
    table = Table("", *measured, title=f"{judged}; 95 % intervals over behaviours", title_justify="left")
    shown: dict[str, dict[str, Any]] = {}
    places = {
        **{f"ASR, {title}": ("attacks", attack) for attack, title in first["titles"].items()},
        "over-refusal": ("refused",),
        "benign requests helped": ("helped",),
    }
    for heading, place in places.items():
        shown[heading] = {m: proportion(_rates(r, *place)) for m, r in measured.items()}
        for judge in (name for name, of in first["others"].items() if _rates(of, *place)):
            others = {m: proportion(_rates(r["others"][judge], *place)) for m, r in measured.items()}
            shown[f"{heading}, by {judge}"] = others
    for heading, entries in shown.items():
        table.add_row(heading, *(_cell(entry) for entry in entries.values()))
    balances = {
        m: {
            a: balance(shown[f"ASR, {title}"][m]["value"], shown["benign requests helped"][m]["value"])
            for a, title in r["titles"].items()
        }
        for m, r in measured.items()
    }
    for attack in first["attacks"]:
        table.add_row(f"balance, {attack}", *(f"{balances[m][attack]:.2f}" for m in measured))
    for attack in first["attacks"]:
        table.add_row(f"cost of a case, {attack}", *(_cost(r["spent"].get(attack)) for r in measured.values()))
    console.print(table)
    if options.transfer_from:
        console.print(f"white-box test cases made on {options.transfer_from}")
    console.print("balance: harmonic mean of 1 − ASR and benign requests helped; refusing everything gives 0")
    paired: dict[str, Any] = {}
    if len(measured) == 2:
        control, treated = measured.values()
        kinds = {
            f"ASR, {title}": (treated["attacks"][a], control["attacks"][a]) for a, title in first["titles"].items()
        }
        kinds["over-refusal"] = (treated["refused"], control["refused"])
        kinds["benign requests helped"] = (treated["helped"], control["helped"])
        kinds = {name: (a, b) for name, (a, b) in kinds.items() if a.keys() & b.keys()}
        paired = {name: paired_difference(*both, seed=options.seed) for name, both in kinds.items()}
        adjusted = holm({name: entry["p"] for name, entry in paired.items()})
        console.print(f"{options.compare} less {options.model}, paired by behaviour, p after Holm's correction:")
        for name, entry in paired.items():
            entry["p_holm"] = adjusted[name]
            low, high = entry["interval"]
            console.print(f"  {name}: {entry['value']:+.2f} ({low:+.2f} to {high:+.2f}), p = {adjusted[name]:.3g}")
    for model, result in measured.items():
        for other in result["others"].values():
            for what, entry in other["agreement"].items():
                if what != "helped":  # nearly the same again
                    answers = "benign answers" if what == "refused" else f"answers to {what}"
                    said = agreement_text(entry, answers, harmful=what != "refused")
                    console.print(f"{model}: {said}", soft_wrap=True)
        for whose, of in (("", result), *((f" by {judge}", of) for judge, of in result["others"].items())):
            for what, entry in of["undecided"].items():
                if entry["n"]:
                    verdicts = "1 verdict" if entry["n"] == 1 else f"{entry['n']} verdicts"
                    console.print(
                        f"{model}: {verdicts} on {what} undecided{whose}, counted as no success: {entry['first']}"
                    )
        for attack, failed in result["failed"].items():
            for behavior, reason in failed.items():
                console.print(f"{model}, {attack}: {behavior} has no test case: {reason}")
    config = {**vars(options), **_addresses(options), "rules": judge_rules()}
    config["data"] = {name: digest(Path(config[name])) for name in _FILES if config[name] is not None}
    name = file_name(f"redteam-{_what(measured, options)}")
    apart = _apart(options.output / f"{name}.json", config)
    if apart:
        console.print(f"{name}.json is of other options and stays as it is", soft_wrap=True)
    _draw(measured, options.output, "-".join(measured) + _source(options), apart)
    if skipped:
        console.print(f"copyright rows left out and not counted: {len(skipped)}")
    record = write_record(
        options.output / f"{name}{apart}.json",
        "redteam",
        {
            "rates": shown,
            "balance": balances,
            "paired": paired,
            "models": _with_text_keys(measured),
            "identities": identities,
            "skipped": skipped,
        },
        config=config,
        seed=options.seed,
    )
    console.print(f"record: {record}", soft_wrap=True)


def _rates(of: dict[str, Any], kind: str, attack: str | None = None) -> list[float]:
    """One judge's rates, by behaviour or by benign request; none where it did not judge them."""
    return list((of[kind] if attack is None else of[kind].get(attack, {})).values())


def _addresses(options: Any) -> dict[str, str | None]:
    """The endpoints for the record, without addresses, which can carry a password."""
    from plot_align.inference.endpoint import Endpoint

    given = {
        "attacker_url": (options.attacker_url, options.attacker, options.attacker_key),
        "judge_url": (options.judge_url, options.judge_model, options.judge_key),
    }
    return {name: Endpoint(*of).label if all(of) else None for name, of in given.items()}


def _source(options: Any) -> str:
    return f"-cases-of-{options.transfer_from}" if options.transfer_from else ""


def _what(measured: dict[str, dict[str, Any]], options: Any) -> str:
    """Models, attacks and source of the cases, for file names."""
    attacks = "-".join(name.strip() for name in options.attacks.split(","))
    return f"{'-'.join(measured)}-{attacks}{_source(options)}"


def _apart(path: Path, config: dict[str, Any]) -> str:
    """The end of a file's name that tells ``config`` from that of the record in ``path``: by another judge, say. Empty
    where there is none, or one of the same options."""
    from plot_align.records import read_record

    deciding = plain_json({key: value for key, value in config.items() if key not in _DECIDE_NOTHING})
    try:
        there = read_record(path, "redteam")["config"]
    except InputError:  # none, or a damaged one
        return ""
    if all(there.get(key) == value for key, value in deciding.items()):
        return ""
    return f"-{json_digest(deciding)[:8]}"


def _draw(measured: dict[str, dict[str, Any]], output: Path, name: str, apart: str) -> None:
    """Draw the curves of each attack that have two points. ``apart``: the end of the record's name."""
    from plot_align.redteam.curves import draw
    from plot_align.results import ATTACK_CURVES, BUDGET_CURVES

    for key, xlabel in ATTACK_CURVES.items():
        for attack in next(iter(measured.values()))[key]:
            curves = {model: result[key][attack] for model, result in measured.items()}
            if all(len(curve) > 1 for curve in curves.values()):
                for ending in ("png", "svg"):
                    draw(curves, xlabel, output / f"{file_name(f'{attack}-{key}-{name}')}{apart}.{ending}")
    for key, xlabel in BUDGET_CURVES.items():
        for model, result in measured.items():
            if sum(map(len, result[key].values())) > 1:
                for ending in ("png", "svg"):
                    draw(
                        result[key],
                        xlabel,
                        output / f"{file_name('-'.join(result[key]) + f'-{key}-{model}')}{apart}.{ending}",
                        budget=True,
                    )


def _cost(spent: dict[str, float] | None) -> str:
    if spent is None:
        return "unknown"
    backward, attacker = spent["backward_tokens"], spent["attacker_tokens"]
    more = f" + {backward:,.0f} backward" * (backward > 0) + f" + {attacker:,.0f} of the attacker" * (attacker > 0)
    return f"{spent['forward_tokens']:,.0f}{more} tokens, {spent['seconds']:.1f} s"


def _with_text_keys(value: Any) -> Any:
    """``value`` with text keys, since JSON has no others."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    return value


def _cell(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['value']:.2f} ({low:.2f}–{high:.2f}), n {entry['n']}"
