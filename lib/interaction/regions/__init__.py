"""What clicks draw where nothing is drawn: a region for each, and one structure for all of them together."""
