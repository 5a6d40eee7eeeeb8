"""MLflow where it is switched on, and nothing of it where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lib.trainers.reporting.tracking import Tracking

REPOSITORY = Path(__file__).resolve().parents[3]


def test_without_an_address_nothing_is_imported() -> None:
    code = (
        "import sys; from lib.trainers.reporting.tracking import Tracking; t = Tracking('', 'run', {}); "
        "t.log({'a': 1}, 1); "
        "t.close(); sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120).returncode == 0


@pytest.mark.filterwarnings("ignore")
def test_run_is_logged_with_its_parameters_and_numbers(tmp_path: Path) -> None:
    import mlflow

    address = f"sqlite:///{tmp_path / 'runs.db'}"
    tracking = Tracking(address, "retrain", {"learning_rate": 0.001})
    for step in (1, 2):
        tracking.log({"loss": 1 / step}, step)
    tracking.close()
    client = mlflow.MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("unetr")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("retrain", "FINISHED")
    assert run.data.params == {"learning_rate": "0.001"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1.0), (2, 0.5)]


@pytest.mark.filterwarnings("ignore")
def test_address_that_cannot_be_used_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracking = Tracking("nonsense://x", "run", {})
    assert "MLflow at nonsense://x cannot be used, and the run goes on without" in caplog.text
    tracking.log({"loss": 1.0}, 1)
    tracking.close()
