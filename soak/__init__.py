"""Faults, injected into every long command; see ``docs/reliability.md``, which ``make soak`` writes."""
