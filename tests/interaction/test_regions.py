"""What a click draws where nothing is drawn yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.growth import NEVER
from lib.interaction.prompts import make_prompts
from lib.interaction.regions import kept_regions, region_claim

ISOTROPIC = (1.0, 1.0, 1.0)


def organ_and_neighbour(noise: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, a ball of radius 14, and a larger ball of the same intensities that a thin bridge joins to it."""
    x, y, z = np.indices((90, 60, 60))
    organ = (x - 22) ** 2 + (y - 30) ** 2 + (z - 30) ** 2 <= 14**2
    neighbour = (x - 64) ** 2 + (y - 30) ** 2 + (z - 30) ** 2 <= 22**2
    bridge = (abs(x - 40) < 8) & (abs(y - 30) <= 1) & (abs(z - 30) <= 1)
    image = np.where(organ | neighbour | bridge, 0.6, 0.2) + np.random.default_rng(0).normal(0, noise, x.shape)
    return image.astype(np.float32), organ, neighbour


def dice(found: np.ndarray, right: np.ndarray) -> float:
    return float(2 * (found & right).sum() / (found.sum() + right.sum()))


def drawn(
    image: np.ndarray, *clicks: tuple[int, int, int], negative: tuple[tuple[int, int, int], ...] = ()
) -> np.ndarray:
    scene = Scene(
        MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4)), np.zeros(image.shape, np.uint8), np.eye(4)
    )
    return edit_clicks(scene, make_prompts({3: clicks}, negative)).labels == 3


def test_one_click_draws_the_organ_and_not_what_a_thin_bridge_joins_to_it() -> None:
    image, organ, neighbour = organ_and_neighbour()
    found = drawn(image, (22, 30, 30))
    assert dice(found, organ) > 0.95 and not (found & neighbour).any()


def test_region_has_no_holes_where_noise_differs() -> None:
    image, organ, _ = organ_and_neighbour()
    image[20, 28, 33], image[24, 33, 28] = 1.5, -1.0
    found = drawn(image, (22, 30, 30))
    assert found[20, 28, 33] and found[24, 33, 28] and dice(found, organ) > 0.95


def test_click_at_the_edge_of_a_larger_region_does_not_draw_it() -> None:
    image, _, neighbour = organ_and_neighbour()
    edge = (45, 30, 30)  # 3 voxels deep in a ball that is 22 deep
    assert neighbour[edge] and region_claim(image, np.array(edge), ISOTROPIC) is None
    assert drawn(image, edge).sum() < 0.2 * neighbour.sum()


def test_answer_does_not_depend_on_the_order_of_clicks_and_later_ones_are_obeyed() -> None:
    image, _, _ = organ_and_neighbour()
    clicks = [(22, 30, 30), (64, 30, 30), (30, 34, 30), (70, 20, 30)]
    negative = ((22, 41, 30), (64, 30, 48))
    found = drawn(image, *clicks, negative=negative)
    np.testing.assert_array_equal(found, drawn(image, *clicks[::-1], negative=negative[::-1]))
    assert all(found[c] for c in clicks) and not any(found[c] for c in negative)


def test_negative_click_takes_a_part_of_the_drawn_region_away_and_no_more() -> None:
    image, organ, _ = organ_and_neighbour()
    before, after = drawn(image, (22, 30, 30)), drawn(image, (22, 30, 30), negative=((22, 39, 30),))
    away = before & ~after
    assert away[22, 39, 30] and not (after & ~before).any()
    assert 50 < away.sum() < 0.3 * organ.sum()


def test_region_lies_in_the_image_and_its_claim_is_below_that_of_clicks() -> None:
    image, _, _ = organ_and_neighbour()
    claim = region_claim(image, np.array((22, 30, 30)), ISOTROPIC)
    assert claim is not None
    assert (claim.start >= 0).all() and (claim.start + claim.values.shape <= image.shape).all()
    assert claim.values.min() == 0 and claim.values.max() == pytest.approx(NEVER)


def test_region_of_a_click_is_found_once_an_image() -> None:
    image, _, _ = organ_and_neighbour()
    kept, zeros = kept_regions(), np.zeros(image.shape, np.uint8)
    scene = Scene(MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4)), zeros, np.eye(4), kept, "one")
    region = scene.region_of(np.array((22, 30, 30)))
    empty = Scene(MetaTensor(torch.zeros((1, *image.shape)), affine=torch.eye(4)), zeros, np.eye(4), kept, "one")
    assert region is not None and empty.region_of(np.array((22, 30, 30))) is region
    other = Scene(MetaTensor(torch.zeros((1, *image.shape)), affine=torch.eye(4)), zeros, np.eye(4), kept, "other")
    assert other.region_of(np.array((22, 30, 30))) is not region
