"""Counts of preferred and rejected tokens, the targets made of them, and the data sets they come from."""
