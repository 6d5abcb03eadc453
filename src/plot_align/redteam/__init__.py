"""Red-teaming: attacks on one's own models, in HarmBench's formats, and an honest attack success rate."""
