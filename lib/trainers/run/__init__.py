"""The parts of a training run: job, state, steps, data and validation."""
