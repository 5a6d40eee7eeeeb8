"""The UNETR, its activation checkpointing, and its checkpoints."""
