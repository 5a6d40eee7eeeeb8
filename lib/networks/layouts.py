"""Key layouts of UNETR checkpoints: current MONAI, older MONAI, and the published BTCV research checkpoint.

Differences between the layouts:

* MONAI before 0.9 had a ``cls_token`` in the patch embedding that UNETR never used. * The same versions created
``conv3`` and ``norm3`` in every residual block, but used them only where channels change. * MONAI 1.3 to 1.5 made
``cross_attn`` in every transformer block, never called; ``norm_cross_attn`` came with it
  and is still made today (also never called), so that an older checkpoint lacks it.
* Training scripts wrap the network: ``module.`` (DistributedDataParallel), ``network.``, ``model.``, ``_orig_mod.``.

Nothing that takes part in a forward pass is renamed or dropped: what remains must fit exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

WRAPPERS = ("module.", "_orig_mod.", "network.", "model.", "net.")
NEVER_READ = re.compile(r"vit\.patch_embedding\.cls_token|vit\.blocks\.\d+\.(cross_attn|norm_cross_attn)\..+")
RESIDUAL_PROJECTION = re.compile(r"(?P<block>.+)\.(conv3|norm3)\..+")

StateDict = dict[str, torch.Tensor]


def to_current_layout(state: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> StateDict:
    """Return ``state`` with the keys of the current layout.

    Args:
        state: weights in any supported layout.
        reference: state dict of the network into which they will be loaded.

    Returns:
        Weights whose keys still have to be compared with ``reference`` by a strict load.
    """
    unwrapped = strip_wrappers(state)
    kept = {key: value for key, value in unwrapped.items() if key in reference or not _is_dead(key, unwrapped)}
    missing_but_never_read = {key: value for key, value in reference.items() if NEVER_READ.fullmatch(key)}
    return missing_but_never_read | kept


def strip_wrappers(state: Mapping[str, torch.Tensor]) -> StateDict:
    """Remove the prefixes that training scripts put before every key."""
    stripped = dict(state)
    while prefix := next((w for w in WRAPPERS if stripped and all(key.startswith(w) for key in stripped)), None):
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped


def _is_dead(key: str, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether an older network created this key but never used it in a forward pass."""
    if NEVER_READ.fullmatch(key):
        return True
    match = RESIDUAL_PROJECTION.fullmatch(key)
    if not match:
        return False
    first = state.get(f"{match['block']}.conv1.conv.weight")
    return first is not None and first.shape[0] == first.shape[1]
