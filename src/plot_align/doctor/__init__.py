"""What is wrong with preference data and with a model on it, before any training."""
