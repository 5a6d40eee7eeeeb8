"""Segment many images from the command line: ``python3 run.py segment --studies DIR|URL --model NAME --out DIR``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from lib.cluster.engine import Engine, LocalEngine, Recipe
from lib.cluster.model import ModelFile
from lib.cluster.ray_engine import RayEngine
from lib.cluster.remote import Access, ServerLabels, ServerSource
from lib.cluster.report import as_table, summary
from lib.cluster.results import CaseResult, Masked, ResultFolder
from lib.cluster.source import Shard
from lib.cluster.studies import open_source
from lib.cluster.worker import Case, MakeWorker, Outcome, segment_cases
from lib.commandline import run_command
from lib.configs.catalogue import find_preset
from lib.errors import ConfigError
from lib.models.weights import WeightsLocator
from lib.networks.precision import resolve_device
from lib.storage.full_disk import writing
from lib.storage.json_files import write_json

INTERRUPTED = 130
MOST_THREADS = 1024
MODEL_FOLDER = Path(__file__).resolve().parents[2] / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every case has a mask, 1 if some have none, 2 with a sentence if the input was wrong.

    The status is 130 after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    failed: dict[str, str] = {}
    try:
        code = run_command(lambda: failed.update(_segment(options).failed), options.threads, logging.WARNING)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it ended", file=sys.stderr)
        return INTERRUPTED
    return code or (1 if failed else 0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run.py segment", description="Segment many images, without or beside a server."
    )
    parser.add_argument(
        "--studies",
        required=True,
        help="folder of NIfTI and NRRD files and of folders of DICOM files; or address of a running server, or of a "
        "DICOMweb server, whose series may be chosen by a query: http://pacs/dicom-web?StudyDate=20250101-",
    )
    parser.add_argument(
        "--model", required=True, help="preset whose published or shipped weights segment, or a YAML file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of masks, records and the summary")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="take the K-th of N shares of the cases")
    parser.add_argument("--save-labels", metavar="TAG", default="", help="send the masks to the server as these labels")
    parser.add_argument("--token-file", type=Path, help="file with the server's token; else the variable UNETR_TOKEN")
    parser.add_argument("--model-dir", type=Path, default=MODEL_FOLDER, help="folder of the weights of each preset")
    parser.add_argument(
        "--devices", "--device", default="", help="all, cpu, cuda:0,cuda:1 ...; the best one there is by default"
    )
    parser.add_argument(
        "--engine", choices=("auto", "pytorch"), default="auto", help="auto: on a CPU OpenVINO, where it is faster"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="compute on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, local"
    )
    parser.add_argument(
        "--threads", type=_threads, metavar="COUNT", help="CPU threads of a worker; PyTorch's default if not given"
    )
    return parser


def _segment(options: argparse.Namespace) -> Outcome:
    shard = Shard.parse(options.shard)
    if options.ray and options.devices:
        raise ConfigError("--devices is for this machine; a Ray cluster's workers take the devices of their nodes")
    _check_places(options.studies, options.out)
    preset = find_preset(options.model)
    locator = WeightsLocator(options.model_dir / preset.name)
    model = ModelFile.find(preset, locator, compiles=options.engine == "auto")
    source = open_source(options.studies, preset, Access.find(options.token_file), options.save_labels)
    send = None
    if options.save_labels and isinstance(source, ServerSource):
        send = ServerLabels(source.rest, options.save_labels, preset)
        send.check()
        if source.drawn:
            print(
                f"{len(source.drawn)} cases keep their label {options.save_labels!r}, which a person drew", flush=True
            )
    cases = [case for case in source.cases() if case in shard]
    broken = {name: reason for name, reason in source.broken.items() if name in shard}
    make = MakeWorker(source, model.packed() if options.ray else model)
    recipe: Recipe[Case, CaseResult | Masked] = Recipe(model.sha256, make)
    results = ResultFolder(options.out)
    with tqdm(total=len(cases), unit="case", file=sys.stderr) as bar:
        outcome = segment_cases(
            cases,
            results,
            _engine(options),
            lambda: recipe,
            (model.name, model.sha256),
            send,
            lambda case: bar.update() and None,
        )
    outcome.failed |= broken
    print(as_table(outcome))
    name = "summary.json" if shard.count == 1 else f"summary-{shard.number}-of-{shard.count}.json"
    with writing("the summary"):
        write_json(options.out / name, summary(outcome, model.name, model.version))
    return outcome


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}; valid: a number from 1 to {MOST_THREADS}")
    return int(text)


def _check_places(studies: str, out: Path) -> None:
    """Refuse an output folder in which masks could replace images.

    Raises:
        ConfigError: if masks would be written into the folder of the images.
    """
    if "://" not in studies and os.path.realpath(studies) == os.path.realpath(out):
        raise ConfigError(
            f"--out {str(out)!r} is the folder of the images, which masks of the same names would replace"
        )


def _engine(options: argparse.Namespace) -> Engine:
    return RayEngine(options.ray, options.threads) if options.ray else LocalEngine(devices_of(options.devices))


def devices_of(text: str) -> list[str]:
    """Parse device names: ``all`` means every GPU, or else the CPU; an empty text means the best device.

    Raises:
        ConfigError: for an unknown device.
    """
    if text.strip() == "all":
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return gpus or [str(resolve_device(None))]
    return [str(resolve_device(name.strip() or None)) for name in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
