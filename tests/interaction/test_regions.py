"""What a click draws where nothing is drawn yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from lib.interaction.editing import Scene, edit_clicks
from lib.interaction.growth import NEVER, Claim
from lib.interaction.prompts import make_prompts
from lib.interaction.regions.joint import Drawn, sorted_regions
from lib.interaction.regions.single import kept_regions, region_claim

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


def leaky() -> tuple[np.ndarray, np.ndarray]:
    """An image, and an organ of radius 14 that a bridge as wide as itself joins to a ball of nearly its intensities."""
    x, y, z = np.indices((70, 50, 50))
    organ = (x - 20) ** 2 + (y - 25) ** 2 + (z - 25) ** 2 <= 14**2
    other = ((x - 46) ** 2 + (y - 25) ** 2 + (z - 25) ** 2 <= 14**2) & ~organ
    image = np.where(organ, 0.6, np.where(other, 0.58, 0.2)) + np.random.default_rng(0).normal(0, 0.04, x.shape)
    return image.astype(np.float32), organ


def test_negative_click_in_the_middle_of_a_leak_takes_the_leak_away() -> None:
    """Guards that it reaches as far as it lies deep in what was drawn; growth around it took a fifth of the leak."""
    image, organ = leaky()
    before = drawn(image, (22, 25, 25))
    assert (before & ~organ).sum() > 0.5 * organ.sum()
    after = drawn(image, (22, 25, 25), negative=((46, 25, 25),))
    assert dice(after, organ) > 0.93 and (after & ~organ).sum() < 0.1 * (before & ~organ).sum()


def test_negative_click_beside_the_border_does_not_reach_the_other_side() -> None:
    image, organ, _ = organ_and_neighbour()
    before, after = drawn(image, (22, 30, 30)), drawn(image, (22, 30, 30), negative=((22, 43, 30),))
    changed = np.argwhere(before != after)
    assert not after[22, 43, 30] and dice(after, organ) > 0.95
    assert len(changed) == 0 or np.abs(changed - (22, 43, 30)).max() <= 6


def test_positive_click_on_the_border_of_a_leak_does_not_bring_the_leak_back() -> None:
    image, organ = leaky()
    after = drawn(image, (22, 25, 25), (32, 25, 25), negative=((46, 25, 25),))
    assert after[32, 25, 25] and dice(after, organ) > 0.93


def test_border_lies_where_intensities_are_halfway() -> None:
    """Guards the border on an image whose voxels at the border hold a part of either side, as thick slices do."""
    x, y, z = np.indices((60, 60, 60))
    distance = np.sqrt((x - 30) ** 2 + (y - 30) ** 2 + (z - 30) ** 2)
    image = (0.2 + 0.4 / (1 + np.exp((distance - 14) / 0.8))).astype(np.float32)
    image += np.random.default_rng(0).normal(0, 0.01, image.shape).astype(np.float32)
    found = drawn(image, (30, 30, 30))
    assert not found[distance > 15.5].any() and found[distance < 12.5].all()


def test_structure_from_nothing_leaves_every_voxel_of_other_labels_and_of_a_far_drawing_of_its_own() -> None:
    image, organ, _ = organ_and_neighbour()
    labels = np.zeros(image.shape, np.uint8)
    labels[25:33, 20:40, 20:40] = 5  # another label, a part of the organ
    labels[80:84, 28:32, 28:32] = 3  # drawn by hand, far from the click
    scene = Scene(MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4)), labels.copy(), np.eye(4))
    after = edit_clicks(scene, make_prompts({3: [(18, 30, 30)]}, [(22, 44, 30)])).labels
    np.testing.assert_array_equal(after == 5, labels == 5)
    assert (after[labels == 3] == 3).all()
    assert dice(after == 3, (organ & (labels == 0)) | (labels == 3)) > 0.85


def test_two_labels_that_look_alike_part_between_their_clicks() -> None:
    image, organ = leaky()
    scene = Scene(
        MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4)), np.zeros(image.shape, np.uint8), np.eye(4)
    )
    found = edit_clicks(scene, make_prompts({3: [(20, 25, 25)], 4: [(48, 25, 25)]})).labels
    assert dice(found == 3, organ) > 0.9 and (found[organ] == 4).mean() < 0.1
    assert (found == 4).sum() > 0.6 * organ.sum()


def test_clicks_of_both_kinds_in_one_voxel_of_a_coarser_grid_are_obeyed() -> None:
    image, _, _ = organ_and_neighbour()
    fine = np.diag([0.5, 0.5, 0.5, 1.0])
    labels = np.zeros(tuple(2 * n for n in image.shape), np.uint8)
    scene = Scene(MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4)), labels, fine)
    found = edit_clicks(scene, make_prompts({3: [(44, 60, 60)]}, [(44, 60, 61)])).labels
    assert found[44, 60, 60] == 3 and found[44, 60, 61] == 0 and (found == 3).sum() > 1000


def test_structure_is_solved_once_for_the_same_clicks_and_again_for_others() -> None:
    image, organ, _ = organ_and_neighbour()
    zeros = np.zeros(image.shape, np.uint8)
    scene = Scene(MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4)), zeros, np.eye(4))
    region = scene.region_of(np.array((22, 30, 30)))
    assert region is not None
    one, walls = [Drawn(np.array((22, 30, 30)), region, True)], np.zeros(image.shape, bool)
    none, near, far = (np.array(p, dtype=np.int64).reshape(-1, 3) for p in ([], [[22, 41, 30]], [[80, 30, 30]]))
    first = scene.structure_of(one, organ, none, walls)
    assert scene.structure_of(one, organ, none, walls) is first
    assert scene.structure_of(one, organ, far, walls) is first
    assert scene.structure_of(one, organ, near, walls) is not first
    walls[30:33, 28:32, 28:32] = True
    assert scene.structure_of(one, organ, none, walls) is not first


def test_parts_that_look_different_are_drawn_together_and_the_darker_one_does_not_leak() -> None:
    """Guards a kidney with a cyst: the cyst looks like a muscle that lies beside it, and the rest does not."""
    x, y, z = np.indices((60, 50, 50))
    organ = (x - 24) ** 2 + (y - 25) ** 2 + (z - 25) ** 2 <= 15**2
    cyst = (x - 17) ** 2 + (y - 25) ** 2 + (z - 25) ** 2 <= 7**2
    image = np.where(cyst, 0.35, np.where(organ, 0.7, 0.1)) + np.random.default_rng(0).normal(0, 0.02, x.shape)
    found = drawn(image.astype(np.float32), (17, 25, 25), (31, 25, 25))
    assert dice(found, organ | cyst) > 0.95


def test_region_with_as_many_negative_clicks_as_positive_ones_is_none_unless_it_is_the_best() -> None:
    image = np.zeros((20, 20, 20), np.float32)
    small = Claim(np.array((2, 2, 2)), np.zeros((4, 4, 4), np.float32))
    large = Claim(np.array((8, 8, 8)), np.zeros((8, 8, 8), np.float32))
    one, other, wrong = np.array((3, 3, 3)), np.array((9, 9, 9)), np.array([[10, 10, 10]])
    both = [(one, small), (other, large)]
    clicks = np.array([one, other])
    kept = sorted_regions(image, both, clicks, np.zeros((0, 3), np.int64), ISOTROPIC)
    assert [claim for _, claim in kept] == [large, small]
    kept = sorted_regions(image, both, clicks, wrong, ISOTROPIC)
    assert [tuple(seed) for seed, _ in kept] == [(3, 3, 3), (9, 9, 9)] and [claim for _, claim in kept] == [small, None]
    assert sorted_regions(image, both[1:], clicks[1:], wrong, ISOTROPIC)[0][1] is large


def test_large_structure_that_is_solved_at_half_the_resolution_has_its_border_at_the_full_one() -> None:
    x, y, z = np.indices((100, 100, 100))
    organ = (x - 50) ** 2 + (y - 50) ** 2 + (z - 50) ** 2 <= 39**2
    image = np.where(organ, 0.6, 0.2) + np.random.default_rng(0).normal(0, 0.03, x.shape)
    found = drawn(image.astype(np.float32), (50, 50, 50), negative=((50, 50, 92),))
    assert not found[50, 50, 92] and dice(found, organ) > 0.99
