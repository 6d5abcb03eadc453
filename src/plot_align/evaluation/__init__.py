"""What a tuned model is measured on: the seven sub-preferences, and what must not get worse."""
