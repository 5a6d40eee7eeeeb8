from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from lib.errors import ConfigError
from lib.server.http import tokens
from lib.server.http.tokens import TokenFile, WatchedTokens, add_token, hash_token


def test_token_is_found_by_its_hash_and_is_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    made = {user: add_token(path, user, role) for user, role in (("anna", "annotator"), ("änne", "admin"))}
    file = TokenFile.read(path)
    assert {user: file.find(token).role for user, token in made.items()} == {"anna": "annotator", "änne": "admin"}
    assert file.find("wrong") is None
    assert file.find("\udcff") is None
    assert not any(token in path.read_text(encoding="utf-8") for token in made.values())
    assert all(len(token) == 43 for token in made.values())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_file_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens.yaml", "anna", "annotator")
    assert stat.S_IMODE((tmp_path / "tokens.yaml").stat().st_mode) == 0o600


HASH = hash_token("x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "file"),
        ("tokens: 3", "tokens"),
        ("tokens: [", "not YAML"),
        (f"tokens: [{{user: a, role: king, sha256: {HASH}}}]", "tokens.0.role"),
        ("tokens: [{user: a, role: admin, sha256: secret-as-plain-text}]", "tokens.0.sha256"),
        (f"tokens: [{{user: a, role: admin, sha256: {HASH}, more: 1}}]", "tokens.0.more"),
        ("user: a", "tokens"),
    ],
)
def test_bad_file_is_refused_without_quoting_it(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as refused:
        TokenFile.read(path)
    assert HASH not in str(refused.value) and "secret-as" not in str(refused.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        TokenFile.read(tmp_path / "none.yaml")


def test_command_prints_the_token_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.yaml"
    monkeypatch.setattr("sys.argv", ["tokens", str(path), "anna", "reviewer"])
    assert tokens.main() == 0
    entry = TokenFile.read(path).find(capsys.readouterr().out.strip())
    assert (entry.user, entry.role) == ("anna", "reviewer")


def test_a_token_that_is_taken_out_of_the_file_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    anna, ben = add_token(path, "anna", "annotator"), add_token(path, "ben", "admin")
    watched = WatchedTokens(path)
    assert watched.find(anna) is not None and watched.count == 2
    path.write_text(f"tokens: [{{user: ben, role: reviewer, sha256: {hash_token(ben)}}}]")
    assert watched.find(anna) is None
    assert watched.find(ben).role == "reviewer"  # type: ignore[union-attr]
    later = add_token(path, "carl", "annotator")
    assert watched.find(later).user == "carl"  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["tokens: []", "tokens:", "tokens: [", None])
def test_an_empty_damaged_or_missing_file_lets_nobody_in_until_it_is_valid_again(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "tokens.yaml"
    anna = add_token(path, "anna", "annotator")
    good, watched = path.read_bytes(), WatchedTokens(path)
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert watched.find(anna) is None
    path.write_bytes(good)
    assert watched.find(anna) is not None


def test_a_file_that_looks_unchanged_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    anna = add_token(path, "anna", "annotator")
    watched = WatchedTokens(path)
    watched.read_again()
    assert watched.find(anna) is not None
