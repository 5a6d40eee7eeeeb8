"""Choosing the next case to label."""
