"""The attacks and judges by name; without torch, so that ``--help`` need not wait for it."""

ATTACKS = ("direct", "prefill", "best_of_n", "random", "gcg", "pez", "gbda", "uat", "zero_shot", "sfs")
JUDGES = ("refusal", "prefixes", "likelihood", "harmbench", "endpoint")
TELL_REFUSALS = ("refusal", "prefixes", "endpoint")  # the other judges know success only
CLASSIFIER = "cais/HarmBench-Llama-2-13b-cls"  # of judge harmbench
