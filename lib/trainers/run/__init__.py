"""The parts of a training run: its job, its state, its steps, its data and its validation."""
