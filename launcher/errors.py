"""How a command ends that cannot go on."""

from __future__ import annotations


class RunError(Exception):
    """Something that ends the program with one sentence for the user and this exit code."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code
