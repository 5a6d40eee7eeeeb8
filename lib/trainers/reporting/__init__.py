"""What a training run reports while it runs and afterwards."""
