"""Logging of runs to MLflow, if it is enabled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("unetr.train")

EXPERIMENT = "unetr"


class Tracking:
    """One run in MLflow. Without an address nothing is imported, and all calls do nothing.

    If the tracking server cannot be reached, a warning is logged and the run continues without it.

    Args:
        address: address of a tracking server or database; empty for none.
        name: name of the run.
        params: parameters of the training.
    """

    def __init__(self, address: str, name: str, params: Mapping[str, Any]) -> None:
        self._client: Any = None
        if not address:
            return
        import mlflow  # the import takes seconds, and most servers do not need it

        try:
            client = mlflow.MlflowClient(tracking_uri=address)
            existing = client.get_experiment_by_name(EXPERIMENT)
            experiment = existing.experiment_id if existing else client.create_experiment(EXPERIMENT)
            self._run = client.create_run(experiment, run_name=name).info.run_id
            for key, value in params.items():
                client.log_param(self._run, key, value)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            logger.warning("MLflow at %s cannot be used, and the run goes on without: %s", address, error)
        else:
            self._client = client

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at a step."""
        if self._client is None:
            return
        import mlflow

        try:
            for name, value in metrics.items():
                self._client.log_metric(self._run, name, value, step=step)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            logger.warning("MLflow no longer answers, and the run goes on without: %s", error)
            self._client = None

    def close(self) -> None:
        """End the run."""
        if self._client is not None:
            self._client.set_terminated(self._run)
