"""The pages over plain HTTP: what they say, whom they ask in, and what a hostile address does not get."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image
from synthetic_hippocampus import SyntheticCase

from lib.server.http.tokens import add_token
from tests.integration.conftest import prepare
from tests.integration.server import Server, parse_multipart


def test_page_counts_the_cases_and_names_what_is_served(server: Server) -> None:
    page = server.get("/").text
    total = server.get("/datastore/").json()["total"]
    assert f"{total} cases" in page
    counts = [int(n) for n in re.findall(r'id="count-(?:labelled|leased|open|skipped)">(\d+)<', page)]
    assert len(counts) == 4 and sum(counts) == total
    served = server.get("/model/versions/hippocampus_mr").json()["live"] or "shipped"
    assert re.search(rf'<th scope="row">{served}</th>\s*<td><span class="state good">served now', page)


def test_page_says_what_the_retrain_policy_thinks(server: Server) -> None:
    thought = server.get("/retrain/").json()["hippocampus_mr"]["reason"]
    assert re.search(r"hippocampus_mr: \S.{10,}", server.get("/page/job").text), thought


def test_next_cases_each_come_with_a_reason(server: Server) -> None:
    part = server.get("/page/next").text
    reasons = re.findall(r'<p class="small quiet">([^<]*)</p>', part)
    assert len(reasons) == part.count("<li>") > 0
    assert all(len(reason) > 5 for reason in reasons), reasons


def test_every_asset_comes_from_this_server(server: Server) -> None:
    for path in ("/", "/docs", "/case/case_0"):
        page = server.get(path).text
        addresses = re.findall(r'(?:src|href|url)\s*[=:]\s*["\']([^"\']+)', page)
        assert addresses and not [a for a in addresses if re.match(r"(?:[a-z]+:)?//", a)], path
        for address in addresses:
            if re.search(r"\.(css|js|svg)$", address):
                assert server.get(address).status_code == 200, address
    assert "default-src 'self'" in server.get("/").headers["content-security-policy"]


@pytest.mark.parametrize("section", ["pool", "next", "job", "models", "activity", "system"])
def test_each_part_is_drawn_alone(server: Server, section: str) -> None:
    part = server.get(f"/page/{section}")
    assert part.status_code == 200 and part.text.lstrip().startswith(f'<h2 id="title-{section}"')


def test_events_tell_what_a_request_has_changed(server: Server) -> None:
    with server.http.get(f"{server.url}/page/events", stream=True, timeout=30) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        assert next(lines) == ": listening"
        taken = server.post("/activelearning/first", json={"client_id": "looking"}).json()
        said = [next(lines) for _ in range(3)]
    assert said[1:] == ["event: changed", 'data: ["pool", "next", "activity"]']
    assert server.delete(f"/leases/?image={taken['id']}&client_id=looking").status_code == 200


def test_prediction_is_drawn_where_the_mask_is(server: Server) -> None:
    address = "/case/case_1/slice.png?plane=axial&index=16&layers="
    plain, drawn = (
        np.asarray(Image.open(io.BytesIO(server.get(address + layers).content)).convert("RGB")).astype(int)
        for layers in ("", "prediction")
    )
    assert plain.shape == drawn.shape and plain.shape[0] == 384
    changed = np.argwhere(np.abs(plain - drawn).max(axis=-1) > 40)
    answer = parse_multipart(server.infer("hippocampus_mr", "case_1", result_extension=".nii"))["image"][1]
    mask = np.frombuffer(answer[352:], dtype=np.uint8).reshape(_shape(answer), order="F")[:, :, 16]
    places = np.argwhere(mask.T[::-1, ::-1] > 0) * (384 / mask.shape[1])
    assert np.abs(changed.min(axis=0) - places.min(axis=0)).max() < 14
    assert np.abs(changed.max(axis=0) - (places.max(axis=0) + 384 / mask.shape[1])).max() < 14


def _shape(nifti: bytes) -> tuple[int, ...]:
    return tuple(int(n) for n in np.frombuffer(nifti[42:48], dtype="<i2"))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/case/nobody", 404),
        ("/case/..%2f..%2fetc%2fpasswd", 404),
        ("/case/case_0/slice.png?plane=oblique", 400),
        ("/case/case_0/slice.png?index=-1", 400),
        ("/case/case_0/slice.png?layers=label:..%2fx", 404),
        ("/case/case_0/slice.png?layers=everything", 400),
        ("/case/case_0/slice.png?layers=" + ",".join(["prediction"] * 9), 400),
        ("/page/secrets", 404),
        ("/page/assets/..%2fdrawing.py", 404),
        ("/docs/scripts/..%2f__init__.py", 404),
    ],
)
def test_bad_address_is_refused_with_a_sentence(server: Server, path: str, status: int) -> None:
    answer = server.get(path)
    assert answer.status_code == status
    assert len(answer.json()["detail"]) > 5


def test_pages_ask_for_a_token_and_keep_it_where_no_script_reads_it(
    cases: dict[str, SyntheticCase], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("signed")
    token = add_token(folder / "tokens.yaml", "rita", "reviewer")
    server = prepare(Server(folder, {"tokens": str(folder / "tokens.yaml")}), cases).start()
    try:
        for path in ("/", "/page/pool", "/case/case_0", "/page/events", "/ohif/", "/ohif/monai-label"):
            answer = server.get(path, allow_redirects=False)
            assert (answer.status_code, answer.headers["location"]) == (303, "/page/login"), path
        assert server.post("/page/login", data={"token": "guess"}).status_code == 401
        foreign = server.post("/page/login", data={"token": token}, headers={"Origin": "https://evil.example"})
        assert foreign.status_code == 403
        entered = server.post("/page/login", data={"token": token}, allow_redirects=False)
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert "rita (reviewer)" in server.get("/").text
        assert server.get("/ohif/monai-label").status_code == 200
        assert server.get("/dicom-web/studies").status_code == 200, "the viewer's requests carry the cookie"
        left = server.get("/page/logout", allow_redirects=False)
        assert left.status_code == 303 and server.get("/", allow_redirects=False).status_code == 303
        assert server.get("/dicom-web/studies").status_code == 401
        assert token not in server.log.read_text(errors="replace")
    finally:
        server.stop()
