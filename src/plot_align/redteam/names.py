"""The attacks, judges and curves by name; without torch, for a command's help."""

ATTACKS = ("direct", "prefill", "best_of_n", "random", "gcg", "pez", "gbda", "uat", "zero_shot", "sfs")
JUDGES = ("prefixes", "likelihood", "harmbench", "endpoint")
TELL_REFUSALS = ("prefixes", "endpoint")  # the other judges know success only
ATTACK_CURVES = {  # of an attack's success, as a record calls them: against what
    "by_cases": "test cases a behaviour",
    "by_samples": "sampled answers a behaviour",
    "by_tokens": "tokens of the answer given",
    "by_steps": "update steps",
}
