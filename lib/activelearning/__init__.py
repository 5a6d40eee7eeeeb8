"""Active learning: which case to label next."""
