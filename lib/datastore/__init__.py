"""The datastore: images, submitted labels with their history, and label names."""
