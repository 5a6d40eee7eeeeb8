"""Claims on the network's grid become a mask on the image's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from lib.interaction.growth import NEVER, Claim
from lib.interaction.merge import LabelClaim, apply_claims
from lib.interaction.prompts import Box
from tests.tiny import oblique_affine

SHAPE = (60, 50, 40)


def wide_claim(seed: int, value: int, takes_from: tuple[int, ...] = ()) -> LabelClaim:
    """A claim of which the most is nobody's."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(30, 25, 20)), 2)
    values = np.full(noise.shape, NEVER, np.float32)
    part = (slice(8, 22), slice(7, 18), slice(6, 15))
    values[part] = np.clip(1 + 30 * noise[part], 0, NEVER)
    return LabelClaim(value, takes_from, Claim(np.zeros(3, dtype=np.int64), values))


@pytest.mark.parametrize("affine", [np.eye(4), oblique_affine("LPS")], ids=["straight", "oblique"])
@pytest.mark.parametrize("box", [None, Box((20, 10, 10), (34, 40, 40))], ids=["all", "box"])
def test_what_a_claim_does_not_want_costs_nothing_and_changes_nothing(affine: np.ndarray, box: Box | None) -> None:
    labels = np.asfortranarray(np.random.default_rng(5).integers(0, 4, SHAPE).astype(np.uint8))
    network = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    claims = [wide_claim(1, 1), wide_claim(2, 2, (0, 3))]
    result, parts = apply_claims(labels, affine, claims, network, box)
    differs = result != labels
    assert differs.sum() > 500 and set(np.unique(result[differs])) == {1, 2}
    assert set(np.unique(labels[differs & (result == 2)])) <= {0, 3}
    outside = differs.copy()
    for part in parts:
        outside[part] = False
        assert all(axis.start > 0 and axis.stop < size for axis, size in zip(part, SHAPE, strict=True))
    assert not outside.any()
    if box is not None:
        inside = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
        differs[inside] = False
        assert not differs.any()


def test_claim_that_wants_nothing_changes_nothing() -> None:
    labels = np.ones(SHAPE, np.uint8)
    nothing = Claim(np.array([3, 3, 3]), np.full((6, 6, 6), NEVER, np.float32))
    result, _ = apply_claims(labels, np.eye(4), [LabelClaim(2, (), nothing)], np.eye(4), None)
    np.testing.assert_array_equal(result, labels)
