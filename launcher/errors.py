"""The error that ends a command."""

from __future__ import annotations


class RunError(Exception):
    """An error that ends the program with one sentence for the user and this exit code."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code
