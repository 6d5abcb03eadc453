"""The demonstration: tune one real model with DPO, DPO+SFT and DPO+PLOT on our own pairs, and compare on one page."""
