"""MONAI Label's own pipeline and MONAI's plain one, with a preset's weights: what this project is measured against."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import LrScheduleHandler
from monai.inferers import SimpleInferer, SlidingWindowInferer, sliding_window_inference
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    ClipIntensityPercentilesd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    KeepLargestConnectedComponentd,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    SqueezeDimd,
)
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.tasks.train.basic_train import BasicTrainTask, Context
from monailabel.transform.writer import Writer

from lib.configs.preset import Preset, Window
from lib.networks.checkpoint import load_weights, read_checkpoint
from lib.networks.unetr import build_unetr
from lib.trainers.optimization import build_loss, build_optimizer, build_schedule
from lib.transforms.augment import build_changes, build_cropping

ORIENTATION_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def usual_transforms(preset: Preset) -> list[Callable[..., Any]]:
    """The deterministic chain as MONAI Label's radiology app writes it, on the host, in its default types."""
    intensity = preset.intensity
    if isinstance(intensity, Window):
        scaling = [ScaleIntensityRanged("image", intensity.lower, intensity.upper, 0.0, 1.0, clip=True)]
    else:
        scaling = [
            ClipIntensityPercentilesd("image", intensity.lower_percentile, intensity.upper_percentile),
            NormalizeIntensityd("image"),
        ]
    return [
        Orientationd("image", axcodes=preset.axcodes, labels=ORIENTATION_LABELS),
        Spacingd("image", pixdim=preset.spacing_mm, mode="bilinear", padding_mode="border"),
        *scaling,
        SpatialPadd("image", preset.roi_size, mode="edge" if preset.padding == "edge" else "constant"),
    ]


class _Renamed(MapTransform):
    """MONAI 1.6.1's Spacingd trips over MONAI Label's string ``image_path``; it goes by another name meanwhile."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__([old])
        self._old, self._new = old, new

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        renamed = dict(data)
        renamed[self._new] = renamed.pop(self._old)
        return renamed


class StockInferTask(BasicInferTask):
    """MONAI Label's task with the transforms of its radiology app."""

    def __init__(self, preset: Preset, weights: Path) -> None:
        network = build_unetr(preset)
        load_weights(network, read_checkpoint(weights).model)
        super().__init__(
            path=None,
            network=network,
            type=InferType.SEGMENTATION,
            labels=preset.label_indices,
            dimension=3,
            description="stock",
        )
        self._preset = preset

    def pre_transforms(self, data: Any = None) -> Sequence[Callable[..., Any]]:
        """Reading and the usual chain."""
        return [
            LoadImaged("image"),
            EnsureTyped("image", device=data.get("device") if data else None),
            EnsureChannelFirstd("image"),
            _Renamed("image_path", "path_of_image"),
            *usual_transforms(self._preset),
            _Renamed("path_of_image", "image_path"),
        ]

    def inferer(self, data: Any = None) -> SlidingWindowInferer:
        """Sliding windows with Gaussian blending."""
        options = self._preset.inference
        return SlidingWindowInferer(
            self._preset.roi_size, options.window_batch_size, overlap=options.overlap, mode="gaussian"
        )

    def inverse_transforms(self, data: Any = None) -> list[Callable[..., Any]]:
        """All that can be inverted."""
        return []

    def post_transforms(self, data: Any = None) -> Sequence[Callable[..., Any]]:
        """Probabilities, the largest of them, and components as the preset has it."""
        largest = [KeepLargestConnectedComponentd("pred", applied_labels=list(self._preset.label_indices.values()))]
        return [
            EnsureTyped("pred", device=data.get("device") if data else None),
            Activationsd("pred", softmax=True),
            AsDiscreted("pred", argmax=True),
            *(largest if self._preset.inference.largest_component else []),
            SqueezeDimd("pred", dim=0),
        ]

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """NIfTI, as asked."""
        return Writer(label="pred")({**data, "result_extension": ".nii.gz", "result_dtype": "uint8"})


class StockTrainTask(BasicTrainTask):
    """MONAI Label's task with the same network, crops, loss, optimiser and schedule as this project's.

    Args:
        preset: the task and its recipe.
        folder: for what it writes.
        weights: to start from.
        steps: of the whole run, for the schedule.
        on_step: called after each step with its loss.
    """

    def __init__(
        self, preset: Preset, folder: Path, weights: Path, steps: int, on_step: Callable[[float], None]
    ) -> None:
        super().__init__(str(folder), "stock", load_path=str(weights), tracking=None, labels=preset.label_indices)
        self._preset, self._steps, self._on_step = preset, steps, on_step

    def network(self, context: Context) -> torch.nn.Module:
        """The preset's, on one device."""
        return build_unetr(self._preset)

    def optimizer(self, context: Context) -> torch.optim.Optimizer:
        """The recipe's."""
        return build_optimizer(context.network, self._preset.training)

    def loss_function(self, context: Context) -> torch.nn.Module:
        """The recipe's."""
        return build_loss(self._preset.training)

    def lr_scheduler_handler(self, context: Context) -> LrScheduleHandler:
        """The recipe's, after each step."""
        schedule = build_schedule(context.optimizer, self._preset.training, self._steps)
        return LrScheduleHandler(schedule, print_lr=False, epoch_level=False)

    def train_handlers(self, context: Context) -> list[Any]:
        """The usual ones, and the clock."""
        return [*super().train_handlers(context), _Clock(self._on_step)]

    def train_pre_transforms(self, context: Context) -> Sequence[Callable[..., Any]]:
        """Reading, the usual chain for image and label, and the recipe's crops and augmentation."""
        both = ["image", "label"]
        _orientation, _spacing, *scaling, _padding = usual_transforms(self._preset)
        return [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, axcodes=self._preset.axcodes, labels=ORIENTATION_LABELS),
            Spacingd(both, pixdim=self._preset.spacing_mm, mode=("bilinear", "nearest")),
            *scaling,
            SpatialPadd(both, self._preset.roi_size),
            *build_cropping(self._preset, self._preset.training.crops_per_case).transforms,
            *build_changes(self._preset).transforms,
        ]

    def train_post_transforms(self, context: Context) -> Sequence[Callable[..., Any]]:
        """For its Dice during training, as its radiology app has them."""
        classes = self._preset.out_channels
        return [
            EnsureTyped(["pred", "label"]),
            Activationsd("pred", softmax=True),
            AsDiscreted(["pred", "label"], argmax=(True, False), to_onehot=(classes, classes)),
        ]

    def val_inferer(self, context: Context) -> SimpleInferer:
        """Not used: nothing is held out."""
        return SimpleInferer()


class _Clock:
    """Tells each step's loss."""

    def __init__(self, on_step: Callable[[float], None]) -> None:
        self._on_step = on_step

    def attach(self, engine: Engine) -> None:
        """Listen."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self._on_step(float(e.state.output[0]["loss"])))


def label_windows(preset: Preset, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Labels of an image of shape (1, X, Y, Z) on the network's grid, by MONAI's sliding windows and argmax."""
    options = preset.inference
    with torch.inference_mode():
        logits = sliding_window_inference(
            image[None],
            preset.roi_size,
            options.window_batch_size,
            network,
            overlap=options.overlap,
            mode="gaussian",
            sw_device=next(network.parameters()).device,
            device="cpu",
        )
    return logits[0].argmax(0, keepdim=True).to(torch.uint8)


def plain_monai(preset: Preset, network: torch.nn.Module, image: Path, out: Path) -> None:
    """The usual notebook: transforms, sliding windows in fp32, argmax, the labels inverted by nearest neighbour."""
    chain = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), *usual_transforms(preset)])
    data, options = chain({"image": str(image)}), preset.inference
    data["pred"] = label_windows(preset, network, data["image"])
    back = [Invertd("pred", chain, "image", nearest_interp=True, to_tensor=True)]
    if options.largest_component:
        back.append(KeepLargestConnectedComponentd("pred", applied_labels=list(preset.label_indices.values())))
    labels = Compose(back)(data)["pred"][0].numpy().astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, nib.load(image).affine), out)
