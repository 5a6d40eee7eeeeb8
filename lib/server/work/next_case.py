"""The next case to label: chosen by a strategy among the free cases, and leased to the client."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.interfaces.tasks.strategy import Strategy

from lib.configs.preset import Preset
from lib.datastore.leases import Lease
from lib.datastore.open_cases import OpenCases
from lib.datastore.store import VersionedDatastore
from lib.errors import NotFoundError
from lib.infers.task import UnetrInferTask
from lib.server.tasks import TasksByName
from lib.server.work.image_checks import ImageInspector
from lib.server.work.modality import modality_of, models_for
from lib.server.work.prefetch import Prefetcher, PrefetchKey

MOST_UNFIT_IN_A_ROW = 20
"""Number of unsuitable images that one request reads before it tries the next preset."""


@dataclass(frozen=True)
class NextCase:
    """Chooses cases, and has their masks prefetched.

    Args:
        strategies: strategies by name.
        store: the studies, with the leases.
        presets: the served presets, by name.
        inspector: knows the images that cannot be segmented.
        tasks: the models for automatic segmentation.
        prefetcher: prefetches masks.
    """

    strategies: Mapping[str, Strategy]
    store: VersionedDatastore
    presets: Mapping[str, Preset]
    inspector: ImageInspector
    tasks: TasksByName[UnetrInferTask]
    prefetcher: Prefetcher

    def preview(self, strategy: str) -> dict[str, Any] | None:
        """The current choice of a strategy for the first preset; no case is handed out."""
        open_cases = self._open_cases(next(iter(self.presets)))
        chosen: dict[str, Any] | None = self.strategies[strategy]({"strategy": strategy}, open_cases)
        return chosen

    def choose(
        self, request: dict[str, Any], client: str, hidden: Set[str]
    ) -> tuple[dict[str, Any] | None, Lease | None]:
        """Let a strategy choose among cases that are neither leased nor skipped, and lease its choice to the client.

        A client that names no model gets a case of the first preset that has any left.

        Args:
            request: ``strategy``, ``model`` and the fields that the strategy reads.
            client: the client.
            hidden: images that the client cannot show.

        Returns:
            The choice and its lease; if no other case is left, one that the client has already; None without any.
        """
        models = [str(request["model"])] if request.get("model") else list(self.presets)
        for model in models:
            chosen = self._choose_for(request | {"model": model}, client, hidden, several=len(models) > 1)
            if chosen is not None:
                return chosen
        unfit = frozenset.intersection(*(frozenset(self.inspector.left_out(model)) for model in models))
        return self._own_case(client, hidden | unfit)

    def compute_ahead(self, chosen: Mapping[str, Any]) -> None:
        """Prefetch the masks of the case that is handed out and of the likely next ones."""
        offered = models_for(self.presets, [modality_of(self.store, chosen["id"])])
        model = chosen.get("model") or next(iter(offered), "")
        if model in offered and self.tasks.find(model).is_valid():
            self.prefetcher.want([PrefetchKey(model, image) for image in (chosen["id"], *chosen["next"])])

    def _choose_for(
        self, request: dict[str, Any], client: str, hidden: Set[str], several: bool
    ) -> tuple[dict[str, Any], Lease] | None:
        """Let a strategy choose a case for one model, and lease it.

        A case that is damaged or unsuitable for the model is excluded with the reason, and another one is chosen. If
        several models share the pool, only a limited number of images is read before the next model is tried.

        Returns:
            The choice and its lease; None if no case is left for this model.
        """
        strategy, leases, model = self.strategies[request["strategy"]], self.store.leases, request["model"]
        taken: set[str] = set()
        unfit = 0
        while not several or unfit < MOST_UNFIT_IN_A_ROW:
            chosen: dict[str, Any] | None = strategy(request, self._open_cases(model, taken | hidden))
            if not chosen or not chosen.get("id"):
                return None
            lease = leases.take(chosen["id"], client)
            if lease is not None:
                try:
                    check = self.inspector.check(chosen["id"], self.presets[chosen["model"]])
                    if not check.problem:
                        return chosen | {"path": self.store.get_image_uri(chosen["id"])}, lease
                    leases.release(chosen["id"])
                    unfit += 1
                except (NotFoundError, ImageNotFoundException):  # it has just been deleted
                    leases.release(chosen["id"])
                except Exception:  # the case was not handed out
                    leases.release(chosen["id"])
                    raise
            taken.add(chosen["id"])  # by a concurrent request
        return None

    def _open_cases(self, model: str, others: Set[str] = frozenset()) -> OpenCases:
        """The studies without cases that are leased, skipped, excluded for a model, or among ``others``."""
        leases, left_out = self.store.leases, self.inspector.left_out(model)
        return OpenCases(self.store, leases.active().keys() | leases.skipped().keys() | left_out.keys() | others)

    def _own_case(self, client: str, hidden: Set[str]) -> tuple[dict[str, Any] | None, Lease | None]:
        """The client's longest leased case that is not labelled yet."""
        unlabelled = set(self.store.get_unlabeled_images()) - hidden
        own = [lease for lease in self.store.leases.active().values() if lease.client == client]
        held = sorted((lease for lease in own if lease.image_id in unlabelled), key=lambda lease: lease.since)
        if not held:
            return None, None
        path = self.store.get_image_uri(held[0].image_id)
        reason = "yours already; no other case is open"
        return {"id": held[0].image_id, "path": path, "reason": reason, "next": [], "next_reasons": []}, held[0]
