"""``run.py segment``: install what is missing, then segment many images in the virtual environment."""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

from launcher.environment import set_up
from launcher.processes import as_exit_code
from launcher.project import Project, server_environment

OPTIONS = (
    *("studies", "model", "out", "shard", "save_labels", "token_file"),
    *("model_dir", "devices", "engine", "ray", "threads"),
)


def add_segment(commands: Any) -> None:
    """Add the command; ``lib.cluster.cli`` validates its values."""
    segment = commands.add_parser("segment", help="segment many images, without or beside a server")
    segment.add_argument(
        "--studies",
        required=True,
        help="folder of images, or address of a running server or of a DICOMweb server (with ?StudyDate=... a query)",
    )
    segment.add_argument("--model", required=True, help="preset whose weights segment")
    segment.add_argument("--out", required=True, help="folder of masks, records and the summary")
    segment.add_argument("--shard", metavar="K/N", help="take the K-th of N shares of the cases")
    segment.add_argument("--save-labels", metavar="TAG", help="send the masks to the server as labels of this tag")
    segment.add_argument("--token-file", help="file with the server's token; else the variable UNETR_TOKEN")
    segment.add_argument("--model-dir", help="folder of the weights of each preset")
    segment.add_argument("--devices", "--device", help="all, cpu, cuda:0,cuda:1 ...; the best one there is by default")
    segment.add_argument("--engine", help="auto: on a CPU OpenVINO, where it is faster; or pytorch")
    segment.add_argument("--ray", metavar="ADDRESS", help="compute on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT")
    segment.add_argument("--threads", help="CPU threads of a worker")
    segment.set_defaults(run=run_segment)


def run_segment(project: Project, options: argparse.Namespace) -> int:
    """``run.py segment``; 0 if every case has a mask, 1 if some have none, 2 if the input was wrong."""
    python = set_up(project, dev=False, cluster=bool(options.ray))
    given = {name: getattr(options, name) for name in OPTIONS}
    arguments = [part for name, value in given.items() if value for part in (f"--{name.replace('_', '-')}", value)]
    command = [str(python), "-m", "lib.cluster.cli", *arguments]
    return as_exit_code(subprocess.call(command, env=server_environment(project)))
