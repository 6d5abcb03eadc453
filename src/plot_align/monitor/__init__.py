"""Watches a preference training while it runs, and says when it goes wrong."""

from plot_align.monitor.callback import PreferenceMonitor

__all__ = ["PreferenceMonitor"]
