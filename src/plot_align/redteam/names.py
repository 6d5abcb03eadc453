"""The attacks and judges by name; without torch, for a command's help."""

ATTACKS = ("direct", "random", "gcg", "pez", "gbda", "uat", "zero_shot", "sfs")
JUDGES = ("prefixes", "likelihood", "harmbench", "endpoint", "sandbox")
TELL_REFUSALS = ("prefixes", "endpoint", "sandbox")  # the other judges know success only
