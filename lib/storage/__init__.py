"""Storage mechanisms: atomic file replacement, hashes, size limits, SQLite and caches."""
