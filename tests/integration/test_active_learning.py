"""Two clinicians, one server: never the same case, never a wait; scored in the background; doubts and maps shown."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.activelearning.selection import STRATEGIES
from lib.cases.metrics import dice_per_label, mean_known
from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, parse_multipart, wait_until

CASES = 12
LABELS = ["anterior", "posterior"]


@pytest.fixture(scope="module")
def studies() -> dict[str, SyntheticCase]:
    return {f"subject_{number}": case for number, case in enumerate(draw_cases(CASES, seed=11))}


@pytest.fixture(scope="module")
def active(tmp_path_factory: pytest.TempPathFactory, studies: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server of its own, whose cases nobody else is given."""
    server = prepare(
        Server(tmp_path_factory.mktemp("active"), {"strategy": "entropy", "scoring_minutes": "5"}), studies
    ).start()
    yield server
    server.stop()


def figures(server: Server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def ask(server: Server, client: str, strategy: str = "", **params: object) -> dict:
    answer = server.post(f"/activelearning/{strategy}", json={"client_id": client} | params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def infer(server: Server, image: str) -> dict:
    return json.loads(parse_multipart(server.infer("hippocampus_mr", image))["params"][1])


def submit(server: Server, image: str, label: np.ndarray, affine: np.ndarray, folder: Path) -> None:
    answer = server.save_label(image, encode(label, affine, folder), LABELS)
    assert answer.status_code == 200, answer.text


def ready(server: Server, *images: str) -> None:
    """Wait until nothing is left to be computed ahead."""
    done = 'unetr_prefetches_total{model="hippocampus_mr",outcome="done"}'
    wait_until(lambda: figures(server)["unetr_prefetches_waiting"] == 0 and figures(server).get(done, 0) >= len(images))


def test_strategies_are_listed_the_default_first(active: Server) -> None:
    listed = active.get("/info/").json()["strategies"]
    assert next(iter(listed)) == "entropy"
    assert set(listed) == set(STRATEGIES)


def test_two_clients_in_turns_never_get_the_same_case_and_never_wait(active: Server) -> None:
    hits = 'unetr_result_cache_total{model="hippocampus_mr",ready="hit"}'
    before = figures(active).get(hits, 0)
    given: list[str] = []
    for _ in range(3):
        both = [ask(active, client)["id"] for client in ("anna", "ben")]
        ready(active, *both)
        for image in both:
            assert infer(active, image)["cache"]["hit"] is True
        given += both
    assert len(set(given)) == 6
    after = figures(active)
    assert after[hits] - before == 6
    assert after.get('unetr_result_cache_total{model="hippocampus_mr",ready="miss"}', 0) == 0


def test_mask_from_the_cache_is_the_one_that_is_computed(active: Server, studies: dict[str, SyntheticCase]) -> None:
    def mask(**params: object) -> np.ndarray:
        sent = {"result_extension": ".nii.gz"} | params
        content = parse_multipart(active.infer("hippocampus_mr", "subject_0", **sent))["image"][1]
        return np.asarray(nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(content))).dataobj)

    first, second = mask(), mask()
    np.testing.assert_array_equal(first, second)
    case = studies["subject_0"]
    assert first.shape == case.label.shape
    measured = mean_known(dice_per_label(first, case.label, {"anterior": 1, "posterior": 2}).values())
    assert measured > 0.8
    said = infer(active, "subject_0")
    quality = said["quality"]
    assert abs(quality["estimated_dice"] - measured) < 4 * quality["error"], "the estimate means something"
    assert quality["calibrated_on"] == 45


def test_uncertainty_lies_on_the_image_and_is_largest_at_the_edge(
    active: Server, studies: dict[str, SyntheticCase]
) -> None:
    answer = active.get("/uncertainty/hippocampus_mr?image=subject_1")
    assert answer.status_code == 200
    picture = nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(answer.content)))
    case, entropy = studies["subject_1"], np.asarray(picture.dataobj)
    assert entropy.shape == case.image.shape and entropy.dtype == np.float32
    np.testing.assert_allclose(picture.affine, case.affine_ras, atol=1e-5)
    assert entropy.min() >= 0 and entropy.max() <= 1
    assert entropy[case.label > 0].mean() > 5 * entropy[case.label == 0].mean()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/uncertainty/hippocampus_mr?image=nope", 404),
        ("/uncertainty/nope?image=subject_0", 404),
        ("/uncertainty/hippocampus_mr?image=../../etc/passwd", 404),
        ("/uncertainty/hippocampus_mr", 400),
        ("/review/nope", 404),
        ("/review/hippocampus_mr?limit=0", 400),
    ],
)
def test_wrong_questions_are_refused(active: Server, path: str, status: int) -> None:
    assert active.get(path).status_code == status


def test_background_scoring_fills_reasons_and_the_review_queue(
    active: Server, studies: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    for name in list(studies)[:5]:
        case = studies[name]
        label = np.roll(case.label, 6, axis=1) if name == "subject_2" else case.label
        submit(active, name, label, case.affine_ras, tmp_path)
    # nobody asks for it: the server looks at what is new when it is quiet
    wait_until(lambda: active.get("/review/hippocampus_mr").json()["compared"] == 5, 500)
    review = active.get("/review/hippocampus_mr").json()
    assert review["labelled"] == 5
    assert review["model"] == {"preset": "hippocampus_mr", "version": "shipped"}
    assert review["cases"][0]["image"] == "subject_2"
    assert review["cases"][0]["suspicion"] > 2 * review["cases"][1]["suspicion"]
    sample = ask(active, "clara")
    assert sample["id"] in list(studies)[5:]
    assert sample["reason"].startswith("entropy 0.") and sample["reason"].endswith(", model shipped")
    assert "rank 1 of" in sample["reason"]
    corrected = studies["subject_2"]
    submit(active, "subject_2", corrected.label, corrected.affine_ras, tmp_path)
    queue = active.get("/review/hippocampus_mr").json()
    assert "subject_2" not in [case["image"] for case in queue["cases"]], "a new label is not doubted for the old one"
