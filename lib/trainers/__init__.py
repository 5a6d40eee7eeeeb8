"""Training, evaluation and publication of weights."""
