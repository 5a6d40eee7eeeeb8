"""The bodies of requests: typed, bounded, and described in OpenAPI as they are checked."""

from __future__ import annotations

from typing import Any

import pytest

from lib.errors import ParameterError
from lib.server.http.bodies import BatchRequest, NextSampleRequest, ScoringRequest
from lib.server.http.parameters import check_fields, json_body_of
from lib.trainers.request import SERVER_FIELDS, TrainRequest


@pytest.mark.parametrize(
    ("model", "params", "name"),
    [
        (BatchRequest, {"max_workers": 1_000_000}, "max_workers"),
        (BatchRequest, {"max_workers": True}, "max_workers"),
        (BatchRequest, {"max_workers": "2"}, "max_workers"),
        (BatchRequest, {"max_workers": -1}, "max_workers"),
        (BatchRequest, {"multi_gpu": "yes"}, "multi_gpu"),
        (BatchRequest, {"gpus": "0; rm"}, "gpus"),
        (BatchRequest, {"images": "some"}, "images"),
        (BatchRequest, {"images": [1]}, "images"),
        (ScoringRequest, {"minutes": True}, "minutes"),
        (ScoringRequest, {"minutes": "10"}, "minutes"),
        (ScoringRequest, {"minutes": [1]}, "minutes"),
        (ScoringRequest, {"minutes": -1}, "minutes"),
        (ScoringRequest, {"minutes": 1e308}, "minutes"),
        (ScoringRequest, {"minutes": 10**400}, "minutes"),
        (ScoringRequest, {"steps": 0}, "steps"),
        (ScoringRequest, {"steps": 1e308}, "steps"),
        (ScoringRequest, {"model": ["hippocampus_mr"]}, "model"),
        (ScoringRequest, {"model": "x" * 201}, "model"),
        (NextSampleRequest, {"model": ["hippocampus_mr"]}, "model"),
        (NextSampleRequest, {"seed": "1"}, "seed"),
        (NextSampleRequest, {"seed": 1.5}, "seed"),
        (NextSampleRequest, {"region": "left"}, "region"),
        (NextSampleRequest, {"client_id": {"a": 1}}, "client_id"),
    ],
)
def test_fields_of_another_type_or_size_are_refused(model: Any, params: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError, match=f"'{name}'"):
        check_fields(model, params)


def test_what_clients_send_is_taken() -> None:
    assert check_fields(BatchRequest, {"device": ["cpu", "cuda"], "images": ["a"], "more": 1}).device == "cpu"
    assert check_fields(NextSampleRequest, {"client_id": "anna", "seed": None, "ts": 3}).client_id == "anna"
    assert check_fields(NextSampleRequest, {}) == NextSampleRequest()


def test_openapi_has_every_field_that_a_client_may_set_and_no_other() -> None:
    schema = json_body_of(TrainRequest, SERVER_FIELDS)["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == TrainRequest.model_fields.keys() - set(SERVER_FIELDS)
    assert "required" not in schema
    assert schema["properties"]["max_epochs"]["maximum"] == 100_000
