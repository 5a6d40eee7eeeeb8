"""The interface's languages."""

from __future__ import annotations

import re
from string import Formatter

import pytest

from lib.server.pages.language import FOLDER, codes, language_for, read_language

TEMPLATES = FOLDER.parent / "templates"


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("code", sorted(codes() - {"en"}))
def test_languages_have_the_same_texts_with_the_same_values(code: str) -> None:
    english, other = read_language("en").texts, read_language(code).texts
    assert set(other) == set(english)
    assert {key: placeholders(text) for key, text in other.items()} == {
        key: placeholders(text) for key, text in english.items()
    }


def test_every_text_of_the_templates_is_there_and_none_is_left_over() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.html"))
    text += "\n".join(path.read_text(encoding="utf-8") for path in FOLDER.parent.glob("*.py"))
    used = set(re.findall(r"\bt\(['\"]([a-z]+\.[a-z]+)['\"]", text))
    families = set(re.findall(r"\bt\(['\"]([a-z]+)\.['\"] ~", text))
    known = set(read_language("en").texts)
    assert used <= known, "texts that the templates ask for"
    left_over = {key for key in known - used if key.split(".")[0] not in families}
    assert not left_over, "texts that nothing asks for"


@pytest.mark.parametrize(
    ("accepted", "code"),
    [
        (None, "en"),
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-GB,zh;q=0.9", "en"),
        ("fr, zh;q=0.2, en;q=0.1", "zh"),
        ("zh;q=0, en", "en"),
        ("../zh, ;;q=x, zh;q=nan", "en"),
        ("," * 10_000 + "zh", "en"),
    ],
)
def test_language_follows_the_browser(accepted: str | None, code: str) -> None:
    assert language_for(accepted).code == code


def test_text_without_a_value_that_it_needs_is_a_defect() -> None:
    with pytest.raises(KeyError):
        read_language("en")("pool.total", number=3)
