"""The UNETR, its activation checkpointing, and its checkpoint files."""
