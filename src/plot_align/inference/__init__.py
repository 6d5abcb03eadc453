"""What a model answers, and how likely it finds an answer: local models and endpoints."""
