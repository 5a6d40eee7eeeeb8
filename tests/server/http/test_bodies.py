"""The bodies of requests: typed, bounded, and described in OpenAPI as they are checked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from pydantic import BaseModel

from lib.errors import ParameterError
from lib.server.http.bodies import BatchRequest, InferParams, LabelParams, NextSampleRequest, ScoringRequest
from lib.server.http.parameters import check_fields, json_body_of
from lib.trainers.request import SERVER_FIELDS, TrainRequest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # passlib, which MONAI Label uses, imports crypt
    from lib.server.app import app


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
        (InferParams, {"client_id": "x" * 201}, "client_id"),
        (InferParams, {"image": ["/etc/passwd"]}, "image"),
        (InferParams, {"image": "x" * 5000}, "image"),
        (InferParams, {"device": {"cpu": 1}}, "device"),
        (InferParams, {"result_extension": "x" * 21}, "result_extension"),
        (InferParams, {"result_dtype": ["uint8"]}, "result_dtype"),
        (InferParams, {"result_compress": "maybe"}, "result_compress"),
        (InferParams, {"save_label": 2}, "save_label"),
        (InferParams, {"label_tag": "x" * 33}, "label_tag"),
        (InferParams, {"label": ["spleen"]}, "label"),
        (InferParams, {"foreground": [[0, 0, 0]] * 501}, "foreground"),
        (InferParams, {"background": {"0": 1}}, "background"),
        (InferParams, {"roi": [0] * 7}, "roi"),
        (LabelParams, {"model": ["hippocampus_mr"]}, "model"),
        (LabelParams, {"client_id": [1]}, "client_id"),
        (LabelParams, {"source": {"a": 1}}, "source"),
        (LabelParams, {"engine": "x" * 501}, "engine"),
    ],
)
def test_fields_of_another_type_or_size_are_refused(model: Any, params: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError, match=f"'{name}'"):
        check_fields(model, params)


def test_what_clients_send_is_taken() -> None:
    assert check_fields(BatchRequest, {"device": ["cpu", "cuda"], "images": ["a"], "more": 1}).device == "cpu"
    assert check_fields(NextSampleRequest, {"client_id": "anna", "seed": None, "ts": 3}).client_id == "anna"
    assert check_fields(NextSampleRequest, {}) == NextSampleRequest()
    assert check_fields(InferParams, {}) == InferParams()
    for value in (True, False, 0, 1, "true", "False", "1", "0", ""):
        assert check_fields(InferParams, {"save_label": value, "result_compress": value}).save_label == value
    slicer = {"device": "cuda", "result_extension": ".nrrd", "result_dtype": "uint8", "client_id": 5, "logits": False}
    assert check_fields(InferParams, slicer | {"foreground": [[1, 2, 3]], "roi": [], "spleen": [[1, 2, 3]]}).roi == []
    info = [{"name": "spleen", "idx": 1, "color": [1, 2, 3]}]
    assert check_fields(LabelParams, {"label_info": info, "complete": True, "note": {"a": 1}}).label_info == info


@pytest.mark.parametrize(
    ("path", "method", "model"),
    [("/infer/{model}", "post", InferParams), ("/datastore/label", "put", LabelParams)],
)
def test_openapi_describes_the_part_params_of_forms(path: str, method: str, model: type[BaseModel]) -> None:
    content = app.openapi()["paths"][path][method]["requestBody"]["content"]["multipart/form-data"]["schema"]
    part = app.openapi()["components"]["schemas"][content["$ref"].rsplit("/", 1)[1]]["properties"]["params"]
    assert part["type"] == "object" and part["properties"].keys() == model.model_fields.keys()
    assert "required" not in part and part["default"] == {}
    assert part["properties"]["client_id"]["anyOf"][0]["maxLength"] == 200
    assert part["properties"]["label_info"]["items"]["properties"].keys() == {"name", "idx"}


def test_openapi_has_every_field_that_a_client_may_set_and_no_other() -> None:
    schema = json_body_of(TrainRequest, SERVER_FIELDS)["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == TrainRequest.model_fields.keys() - set(SERVER_FIELDS)
    assert "required" not in schema
    assert schema["properties"]["max_epochs"]["maximum"] == 100_000
