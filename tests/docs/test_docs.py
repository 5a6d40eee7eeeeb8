"""What the pages say is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launcher.project import SERVER_ENVIRONMENT
from lib import errors
from lib.configs.catalogue import shipped_preset_names
from lib.configs.preset import parse_preset
from lib.configs.settings import Settings
from lib.infers.writer import DTYPES, EXTENSIONS
from lib.trainers.request import SERVER_FIELDS, TrainRequest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (path.parent / t).exists()]
    assert missing == []


def test_example_preset_is_valid() -> None:
    example = re.search(r"```yaml\n(.*?)```", page("docs/how-to/own-preset.md"), re.DOTALL)
    assert example is not None
    preset = parse_preset(yaml.safe_load(example[1]), "example")
    assert preset.label_indices == {"spleen": 1}


def test_every_conf_key_is_documented() -> None:
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", page("docs/reference/conf.md"), re.MULTILINE))
    assert documented == set(Settings.model_fields)


def test_environment_variables_are_documented() -> None:
    documented = set(
        re.findall(r"^\| `((?:MONAI_LABEL|OMP|MALLOC)_[A-Z_]+)` \|", page("docs/reference/conf.md"), re.MULTILINE)
    )
    assert documented == set(SERVER_ENVIRONMENT)


def test_every_preset_is_in_the_readme() -> None:
    assert set(re.findall(r"^\| `([a-z_]+)` \|", page("README.md"), re.MULTILINE)) >= set(shipped_preset_names())


def test_every_training_field_is_documented() -> None:
    _, _, training = page("docs/reference/rest.md").partition("## Training")
    cells = re.findall(r"^\| (`[^|]+`) \|", training, re.MULTILINE)
    assert {
        name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)
    } == TrainRequest.model_fields.keys() - set(SERVER_FIELDS)


def test_every_kind_of_result_is_documented() -> None:
    rows = dict(re.findall(r"^\| `(result_\w+)` \| ([^|]+) \|", page("docs/reference/rest.md"), re.MULTILINE))
    assert set(re.findall(r"`([^`]+)`", rows["result_extension"])) == set(EXTENSIONS)
    assert set(re.findall(r"`([^`]+)`", rows["result_dtype"])) == set(DTYPES)


def test_every_error_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+Error)` \|", page("docs/reference/errors.md"), re.MULTILINE))
    raised = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert documented == raised - {"UnetrError", "InputError"}
