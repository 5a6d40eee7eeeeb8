"""The MONAI Label app: it reads ``--conf`` once, builds the tasks and passes them to MONAI Label."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

# MONAI Label imports this file by path, and removes the app's folder from sys.path afterwards.
REPOSITORY = str(Path(__file__).resolve().parents[2])
if REPOSITORY not in sys.path:
    sys.path.insert(0, REPOSITORY)

from monailabel.interfaces.app import MONAILabelApp  # noqa: E402
from monailabel.interfaces.datastore import Datastore  # noqa: E402
from monailabel.interfaces.tasks.infer_v2 import InferTask  # noqa: E402
from monailabel.interfaces.tasks.scoring import ScoringMethod  # noqa: E402
from monailabel.interfaces.tasks.strategy import Strategy  # noqa: E402
from monailabel.interfaces.tasks.train import TrainTask  # noqa: E402

from lib.activelearning.pool_knowledge import PoolKnowledge  # noqa: E402
from lib.activelearning.score_store import ScoreStore  # noqa: E402
from lib.activelearning.task import check_passes, make_scoring_methods, make_strategies  # noqa: E402
from lib.cluster.batch import ClusterBatch, ServedModel  # noqa: E402
from lib.cluster.ray_engine import RayEngine  # noqa: E402
from lib.configs.settings import Settings  # noqa: E402
from lib.datastore.batch import DrawnLabelsStay  # noqa: E402
from lib.datastore.series import open_datastore  # noqa: E402
from lib.infers.cache import ResultCache  # noqa: E402
from lib.infers.costs import COSTS_FILE, CostBook  # noqa: E402
from lib.infers.devices.lanes import Lanes  # noqa: E402
from lib.infers.interruption import interruptible_by  # noqa: E402
from lib.infers.network_images import NetworkImages  # noqa: E402
from lib.infers.plan import Planner  # noqa: E402
from lib.infers.task import UnetrInferTask  # noqa: E402
from lib.interaction.background import EditorTrainer  # noqa: E402
from lib.interaction.editor import SharedEditor  # noqa: E402
from lib.interaction.served import FOLDER as EDITORS  # noqa: E402
from lib.interaction.served import ServedEditor  # noqa: E402
from lib.interaction.task import make_interactive_tasks  # noqa: E402
from lib.models.weights import WeightsLocator  # noqa: E402
from lib.trainers.pretraining.task import UnetrPretraining  # noqa: E402
from lib.trainers.task import UnetrTrainTask  # noqa: E402


class UnetrRadiologyApp(MONAILabelApp):
    """Segmentation, active learning and retraining with UNETR."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        self.settings = Settings.from_conf(conf)
        self.presets = self.settings.load_presets()
        self.locators = {
            name: WeightsLocator(
                self.settings.weights_folder(preset), self.settings.pretrained_for(name, len(self.presets))
            )
            for name, preset in self.presets.items()
        }
        shared = SharedEditor.if_there(self.settings.editor_file)
        self.editors = {n: ServedEditor(n, at.folder / EDITORS, shared) for n, at in self.locators.items()}
        self.lanes = Lanes.of(self.settings.devices or self.settings.device)
        self._studies = studies.strip()
        self.results = ResultCache(self.settings.result_cache_mib)
        self.knowledge_by_preset = {
            name: PoolKnowledge(preset, self.locators[name], ScoreStore(self.locators[name].folder))
            for name, preset in self.presets.items()
        }
        super().__init__(
            app_dir=app_dir,
            studies=self._studies,
            conf=dict(conf),
            name="UNETR Radiology",
            description="Segments, learns from corrections and retrains with UNETR",
            version="0.1.0",
        )

    @property
    def models(self) -> Mapping[str, InferTask]:
        """Inference tasks by name, including those for clicks."""
        tasks: Mapping[str, InferTask] = self._infers
        return tasks

    @property
    def trainers(self) -> Mapping[str, TrainTask]:
        """Training tasks by name of the model."""
        tasks: Mapping[str, TrainTask] = self._trainers
        return tasks

    @property
    def strategies(self) -> Mapping[str, Strategy]:
        """Strategies for the next case, by name."""
        strategies: Mapping[str, Strategy] = self._strategies
        return strategies

    @property
    def scoring_methods(self) -> Mapping[str, ScoringMethod]:
        """Computations over all images in the background, by name."""
        methods: Mapping[str, ScoringMethod] = self._scoring_methods
        return methods

    def init_datastore(self) -> Datastore:
        """The datastore of files and DICOM series, of a folder or a DICOMweb server, with a label history."""
        presets, roots = list(self.presets.values()), self.settings.image_roots
        store = open_datastore(self._studies, {preset.modality for preset in presets}, presets, roots)
        store.configure(
            self.settings.lease_minutes, self.settings.quarantine_limit_mib, self.settings.predictions_limit_mib
        )
        store.volumes.limit_mib = self.settings.volumes_limit_mib
        return store

    def init_infers(self) -> dict[str, InferTask]:
        """The inference task of each preset, followed by those for clicks and scribbles."""
        settings, book = self.settings, CostBook(self.settings.model_dir / COSTS_FILE)
        planner = Planner(settings.memory_budget, book, settings.cuda_graphs)
        compiles = settings.engine == "auto"
        images, results = NetworkImages(settings.result_cache_mib), self.results
        device, precision, lanes = str(self.lanes.first.device), settings.precision, self.lanes
        automatic = {
            n: UnetrInferTask(p, self.locators[n], device, precision, results, planner, compiles, images, lanes)
            for n, p in self.presets.items()
        }
        return {**automatic, **make_interactive_tasks(automatic, images, results, device, self.editors, planner)}

    def init_batch_infer(self) -> DrawnLabelsStay:
        """Batch inference, which never replaces labels drawn by a person."""
        settings = self.settings
        if not settings.cluster:
            return DrawnLabelsStay(interruptible=interruptible_by)
        compiles = settings.engine == "auto"
        models = {n: ServedModel(p, self.locators[n], settings.precision, compiles) for n, p in self.presets.items()}
        return DrawnLabelsStay(elsewhere=ClusterBatch(RayEngine(settings.cluster), models))

    def init_trainers(self) -> dict[str, TrainTask]:
        """One training task for each preset."""
        settings, costs = self.settings, self.settings.model_dir / COSTS_FILE
        budget, names, device = settings.memory_budget, list(self.presets), str(self.lanes.first.device)
        followed = settings.editor_training == "on"
        return {
            n: UnetrTrainTask(
                p, self.locators[n], device, settings, budget, costs, names,
                follow_up=EditorTrainer(p, self.locators[n], self.editors[n], settings, budget) if followed else None,
            )
            for n, p in self.presets.items()
        }  # fmt: skip

    def init_strategies(self) -> dict[str, Strategy]:
        """Strategies for the next case; that of ``--conf strategy`` comes first, as the clients' default."""
        return make_strategies(self.knowledge_by_preset, self.settings.cold_start_labels, self.settings.strategy)

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Scores for the strategies, and pretraining on all images."""
        settings, device = self.settings, str(self.lanes.first.device)
        check_passes(settings.passes, self.presets)
        pretraining = {
            f"pretrain_{n}": UnetrPretraining(p, self.locators[n].folder, device) for n, p in self.presets.items()
        }
        return pretraining | make_scoring_methods(
            self.knowledge_by_preset,
            device=device,
            precision=settings.precision,
            passes=settings.passes,
            minutes=settings.scoring_minutes,
            cluster=RayEngine(settings.cluster) if settings.cluster else None,
        )
