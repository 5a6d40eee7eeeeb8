from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.command_line import parse_arguments
from launcher.errors import RunError
from launcher.project import server_environment
from launcher.serve import DEFAULT_MODELS, run_serve, server_command
from launcher.supervise import next_steps, server_url
from run import PROJECT


def command_for(*given: str) -> list[str]:
    return server_command(PROJECT, parse_arguments(given))


def values_of(command: list[str], option: str) -> list[str]:
    return [command[at + 1] for at, word in enumerate(command) if word == option]


def conf_of(command: list[str]) -> list[tuple[str, str]]:
    return [(command[at + 1], command[at + 2]) for at, word in enumerate(command) if word == "--conf"]


def test_no_command_means_serve() -> None:
    assert parse_arguments([]).run is run_serve
    assert parse_arguments(["--port", "9000"]).port == 9000


def test_conf_is_passed_on_in_order() -> None:
    command = command_for("--conf", "labels", "spleen,liver", "--conf", "pretrained", "a file.pt")
    assert conf_of(command) == [
        ("models", DEFAULT_MODELS),
        ("labels", "spleen,liver"),
        ("pretrained", "a file.pt"),
    ]


def test_models_become_a_setting_and_stand_before_one() -> None:
    assert conf_of(command_for("--models", "abdomen_ct")) == [("models", "abdomen_ct")]
    assert conf_of(command_for("--conf", "models", "all")) == [("models", "all")]
    assert conf_of(command_for("--models", "abdomen_ct", "--conf", "models", "all")) == [("models", "abdomen_ct")]


def test_own_preset_is_served_in_place_of_the_default_model() -> None:
    assert conf_of(command_for("--conf", "preset", "task.yaml")) == [("preset", "task.yaml")]


def test_studies_folder_is_made_absolute_and_a_url_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert values_of(command_for("--studies", "my images"), "--studies") == [str(tmp_path / "my images")]
    url = "http://127.0.0.1:8042/dicom-web"
    assert values_of(command_for("--studies", url), "--studies") == [url]


def test_tls_options_are_passed_on_and_change_the_address() -> None:
    given = ["--ssl_keyfile", "key.pem", "--ssl_certfile", "cert.pem"]
    assert values_of(command_for(*given), "--ssl_keyfile") == ["key.pem"]
    assert server_url(parse_arguments(given)) == "https://127.0.0.1:8000"


def test_address_for_clients_is_one_that_can_be_called() -> None:
    assert server_url(parse_arguments(["--host", "0.0.0.0"])) == "http://127.0.0.1:8000"
    assert server_url(parse_arguments(["--host", "::1", "--port", "81"])) == "http://[::1]:81"


def test_server_paths_are_absolute() -> None:
    (app,) = values_of(command_for(), "--app")
    assert Path(app).is_absolute() and (Path(app) / "main.py").is_file()


def test_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONAI_LABEL_TRACKING_ENABLED", "true")
    monkeypatch.setenv("PYTHONPATH", "mine")
    environment = server_environment(PROJECT)
    assert environment["MONAI_LABEL_TRACKING_ENABLED"] == "true"
    assert environment["MONAI_LABEL_AUTO_UPDATE_SCORING"] == "false"
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(PROJECT.root), "mine"]


def test_arguments_after_a_double_dash_go_to_pytest_only() -> None:
    assert parse_arguments(["test", "--", "-k", "geometry"]).extra == ["-k", "geometry"]
    with pytest.raises(RunError, match="only 'test'"):
        parse_arguments(["serve", "--", "-k", "geometry"])


def test_next_steps_are_five_lines_and_name_the_address() -> None:
    for given in (["--port", "8123"], ["--port", "8123", "--studies", "http://127.0.0.1:8042/dicom-web"]):
        lines = next_steps(parse_arguments(given)).splitlines()
        assert len(lines) == 5
        assert "http://127.0.0.1:8123" in lines[0]
        assert "OHIF" in lines[4]
        assert "http://127.0.0.1:8123/ohif/" in lines[4]
