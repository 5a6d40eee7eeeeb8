"""Replaces modules of a network by others with the same parameters and names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_modules(module: nn.Module, successor_of: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace each submodule for which ``successor_of`` returns another module; None keeps it."""
    for name, child in module.named_children():
        successor = successor_of(child)
        if successor is None:
            replace_modules(child, successor_of)
        else:
            for key, parameter in child.named_parameters(recurse=False):
                successor.register_parameter(key, parameter)
            setattr(module, name, successor.train(child.training))
