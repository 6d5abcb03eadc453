"""The demonstration: one real model tuned with DPO, DPO+SFT and DPO+PLOT on pairs of our own, judged, on one page."""
