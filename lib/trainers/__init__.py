"""Training, evaluating and publishing."""
