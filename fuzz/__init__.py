"""Fuzzing: `python -m fuzz` feeds every reader of input with spoilt files; docs/fuzzing.md has what it found."""
