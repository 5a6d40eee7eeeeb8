"""The images of a studies folder, and the files there that cannot be segmented."""
