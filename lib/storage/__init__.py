"""Files on disk: atomic replacement, hashes, size limits."""
