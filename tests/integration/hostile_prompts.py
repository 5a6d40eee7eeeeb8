"""What no viewer should send as prompts, and what a server has to hold whatever it is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.server import Server, parse_multipart, read_nrrd

NAN, INFINITY = float("nan"), float("inf")
NOT_POINTS: tuple[Any, ...] = (
    [[-1, 0, 0]], [[0, 0, 9999]], [[2**31, 0, 0]], [[2**62, 0, 0]], [[-(2**62), 0, 0]], [[1e8, 1, 1]], [[1e300, 1, 1]],
    [[1.5, 2, 3]], [[1, 2, 3.0001]], [[NAN, 1, 1]], [[1, INFINITY, 1]],
    [1, 2, 3], [[1, 2]], [[1, 2, 3, 4]], [[]], [[[1, 2, 3]]], [[[1], [2], [3]]], [[1, 2, [3]]], [[1, 2, {}]],
    [[i % 7, i // 7 % 7, i % 5] for i in range(10_000)],
    "1,2,3", ["1,2,3"], [["1", "2", "3"]], [[True, False, True]], [None], [[None, None, None]], {"points": []}, 5, True,
)  # fmt: skip
"""In place of the points of a label that there is: each is to be refused."""
NOT_BOXES: tuple[Any, ...] = (
    "all", 5, {}, {"a": 1}, [1, 2, 3], [NAN] * 6, [1e300] * 6, [True] * 6, [None] * 6, ["1"] * 6,
    [[1, 2], [3, 4], [5, 6]], [900, 999, 0, 5, 0, 5], [-9, -5, 0, 5, 0, 5],
)  # fmt: skip
OTHERS: tuple[dict[str, Any], ...] = (
    {"no such label": [[1, 1, 1]]}, {"x" * 5000: [[1, 1, 1]]}, {"foreground": [[1, 1, 1]]},
    {"foreground": [[1, 1, 1]], "label": 5}, {"foreground": [[1, 1, 1]], "label": ["core"]},
    {"foreground": [[1, 1, 1]], "label": "x" * 5000}, {"foreground": 5, "label": "core"},
    {"all_labels": "maybe"}, {"result_extension": ".exe"}, {"result_extension": [".nrrd"]}, {"result_dtype": {"a": 1}},
    {"device": "tpu"}, {"device": {"a": 1}}, {"label": 5}, {"label": []}, {"selected_label_name": [1]},
)  # fmt: skip
IGNORED: tuple[dict[str, Any], ...] = (
    {"null": [[1, 1, 1]]}, {"undefined": "x"}, {"": [[1, 1, 1]]}, {"label": None},
    {"roi": None}, {"roi": []}, {"background": None}, {"background": []}, {"reset_state": {"a": [1]}},
    {"label_file": "/etc/passwd"}, {"start_from": {"file": "/etc/passwd"}}, {"label_info": []}, {"unknown": 5},
    {"session_id": 5}, {"config": {"a": []}},
)  # fmt: skip
"""What viewers are known to send beside points, or what is none of a server's business."""


def check_prompts(server: Server, model: str, image: dict[str, str], labels: dict[str, int], folder: Path) -> int:
    """Send all of it about an image: refused by name, or left out; and no voxel of another label changes.

    Args:
        server: the server.
        model: that takes clicks.
        image: ``image`` or ``session_id``, as the request's query.
        labels: two of the model's labels and their values.
        folder: for files.

    Returns:
        How many requests were answered with a mask.
    """
    (first, value), (second, _) = labels.items()
    _, before = _send(server, model, image, {first: []}, folder)
    assert before is not None
    point = [1, 1, 1]
    _, right = _send(server, model, image, {first: [point]}, folder)
    assert right is not None and right[tuple(point)] == value
    assert set(np.unique(right[right != before])) <= {value}
    refused: list[dict[str, Any]] = [{first: [point], second: wrong} for wrong in NOT_POINTS]
    refused += [{first: wrong} for wrong in NOT_POINTS] + [{first: [point], "background": w} for w in NOT_POINTS]
    refused += [{first: [point], "roi": wrong} for wrong in NOT_BOXES]
    refused += [{first: [point], **wrong} for wrong in OTHERS]
    refused += [{first: [point], second: [point]}, {first: [point], "background": [point]}]
    for params in refused:
        status, _ = _send(server, model, image, params, folder)
        assert 400 <= status < 500, (status, str(params)[:300])
    for extra in IGNORED:
        status, mask = _send(server, model, image, {first: [point], **extra}, folder)
        assert status == 200 and mask is not None, (status, extra)
        np.testing.assert_array_equal(mask, right, err_msg=str(extra))
    return len(IGNORED)


def _send(
    server: Server, model: str, image: dict[str, str], params: dict[str, Any], folder: Path
) -> tuple[int, np.ndarray | None]:
    sent = {"result_extension": ".nrrd", "all_labels": True, "client_id": "hostile"} | params
    answer = server.post(f"/infer/{model}", params=image, data={"params": json.dumps(sent)})
    if answer.status_code != 200:
        assert answer.json()["detail"], "a refusal says what is wrong"
        return answer.status_code, None
    return 200, read_nrrd(parse_multipart(answer)["image"][1], folder)[0]
