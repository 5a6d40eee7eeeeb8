"""Reports of a training run, during the run and after it."""
