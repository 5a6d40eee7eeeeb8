"""Metrics for Prometheus: requests, the queue, inferences, jobs, the studies and the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lib.errors import UpstreamError

disable_created_metrics()  # would add a creation time to each metric, which is not used

REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INFERENCE_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server. Labels are route templates, model names and kinds, and never text from clients."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = Counter(
            "unetr_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "unetr_request_seconds",
            "Time to answer a request",
            ["method", "route"],
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        self._inference = Histogram(
            "unetr_inference_seconds",
            "Time to segment an image, by stage",
            ["model", "stage"],
            buckets=INFERENCE_SECONDS,
            registry=self.registry,
        )
        self._failures = Counter(
            "unetr_inference_failures", "Images that could not be segmented", ["model", "error"], registry=self.registry
        )
        self._labels = Counter("unetr_labels_saved", "Labels submitted", ["tag"], registry=self.registry)
        self._refused = Counter("unetr_labels_refused", "Labels put into quarantine", registry=self.registry)
        self._jobs = Counter("unetr_jobs", "Jobs that ended", ["kind", "status"], registry=self.registry)
        self._ready = Counter(
            "unetr_result_cache", "Inferences by whether the mask was ready", ["model", "ready"], registry=self.registry
        )
        self._ahead = Counter("unetr_prefetches", "Masks computed ahead", ["model", "outcome"], registry=self.registry)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Register a metric that is read at each scrape."""
        Gauge(name, description, registry=self.registry).set_function(value)

    def watch_studies(self, status: Callable[[], dict[str, Any]], folder: Path | None) -> None:
        """Register counts of the studies and their free disk space, read at each scrape."""
        self.registry.register(_Studies(status, folder))

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a completed request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def count_inference(self, model: str, latencies_ms: dict[str, float]) -> None:
        """Count a segmented image."""
        for stage, milliseconds in latencies_ms.items():
            self._inference.labels(model, stage).observe(milliseconds / 1000)

    def count_ready(self, model: str, hit: bool) -> None:
        """Count an inference that was answered from the result cache (``hit``), or computed."""
        self._ready.labels(model, "hit" if hit else "miss").inc()

    def count_prefetch(self, model: str, outcome: str) -> None:
        """Count a mask that was prefetched (``done``), or not: ``known``, ``interrupted`` or ``failed``."""
        self._ahead.labels(model, outcome).inc()

    def count_failure(self, model: str, error: Exception) -> None:
        """Count an image that could not be segmented."""
        self._failures.labels(model, type(error).__name__).inc()

    def count_label(self, tag: str) -> None:
        """Count a saved label; custom tags are counted together."""
        self._labels.labels(tag if tag in ("final", "original") else "other").inc()

    def count_refused_label(self) -> None:
        """Count a refused label."""
        self._refused.inc()

    def count_job(self, kind: str, status: str) -> None:
        """Count a finished job."""
        self._jobs.labels(kind, status).inc()

    def inference_means(self) -> tuple[int, dict[str, float]]:
        """The number of segmented images, and the mean duration of each stage in milliseconds over all models."""
        sums, counts = dict[str, float](), dict[str, float]()
        for sample in next(iter(self._inference.collect())).samples:
            if sample.name.endswith("_sum"):
                sums[sample.labels["stage"]] = sums.get(sample.labels["stage"], 0) + sample.value
            elif sample.name.endswith("_count"):
                counts[sample.labels["stage"]] = counts.get(sample.labels["stage"], 0) + sample.value
        means = {stage: 1000 * total / counts[stage] for stage, total in sums.items() if counts.get(stage)}
        return round(counts.get("total", 0)), means

    def cache_hits(self) -> int:
        """The number of inferences that were answered from the cache."""
        samples = next(iter(self._ready.collect())).samples
        return round(sum(s.value for s in samples if s.name.endswith("_total") and s.labels["ready"] == "hit"))

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Studies(Collector):
    """Counts of images and labels, and free disk space, read on demand."""

    def __init__(self, status: Callable[[], dict[str, Any]], folder: Path | None) -> None:
        self._status, self._folder = status, folder

    def collect(self) -> Iterable[Metric]:
        """One metric family for each figure."""
        yield from self._counts()
        if self._folder is not None:
            free = shutil.disk_usage(self._folder).free
            yield GaugeMetricFamily("unetr_disk_free_bytes", "Free disk where the studies are", value=free)

    def _counts(self) -> Iterable[Metric]:
        """Counts of images; none if a PACS has never listed them."""
        try:
            status = self._status()
        except UpstreamError:
            yield GaugeMetricFamily("unetr_pacs_answers", "Whether the DICOMweb server answers", value=0)
            return
        yield GaugeMetricFamily("unetr_images", "Images in the studies", value=status.get("total", 0))
        yield GaugeMetricFamily("unetr_images_labelled", "Images with a final label", value=status.get("completed", 0))
        source = status.get("dicom", {})
        if "dicomweb" in source:
            answers, age = "problem" not in source, source["list_age_seconds"]
            yield GaugeMetricFamily("unetr_pacs_answers", "Whether the DICOMweb server answers", value=int(answers))
            yield GaugeMetricFamily("unetr_pacs_list_age_seconds", "Age of its list of series", value=age)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registration does not read the studies."""
        return ()
