"""The parts of ``experiments/real.py``: data, arms, terms that are only tried, measures, and the report."""
