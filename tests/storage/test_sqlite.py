"""SQLite files: WAL mode, and a damaged file is kept aside and made anew."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

import pytest

from lib.storage.sqlite import add_column, connect, open_database

SCHEMA = "CREATE TABLE IF NOT EXISTS cases(name TEXT);"


@pytest.mark.parametrize("level", [None, "DEFERRED"])
def test_database_keeps_its_rows_and_is_in_wal_mode(tmp_path: Path, level: Literal["DEFERRED"] | None) -> None:
    for count in (1, 2):
        database, repaired = open_database(tmp_path / "x.sqlite", SCHEMA, level)
        with database:
            database.execute("INSERT INTO cases VALUES ('a')")
        assert repaired == ""
        assert database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert database.execute("SELECT COUNT(*) AS number FROM cases").fetchone()["number"] == count
        database.close()


def test_damaged_database_is_kept_aside_and_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(b"no database" * 100)
    database, repaired = open_database(path, SCHEMA)
    aside = next(tmp_path.glob("x.sqlite.damaged-*"))
    assert aside.read_bytes() == b"no database" * 100
    assert "x.sqlite was damaged (file is not a database)" in repaired and aside.name in repaired
    assert database.execute("SELECT COUNT(*) FROM cases").fetchone()[0] == 0
    database.close()


def test_database_in_a_missing_folder_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        open_database(tmp_path / "none" / "x.sqlite", SCHEMA)


def test_damaged_database_is_not_connected_to(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        connect(tmp_path / "x.sqlite")


def test_column_is_added_once_and_older_rows_get_its_default(tmp_path: Path) -> None:
    database, _ = open_database(tmp_path / "x.sqlite", SCHEMA)
    database.execute("INSERT INTO cases VALUES ('a')")
    for _ in range(2):
        add_column(database, "cases", "elsewhere", "INTEGER NOT NULL DEFAULT 0")
    assert [tuple(row) for row in database.execute("SELECT name, elsewhere FROM cases")] == [("a", 0)]
    database.close()
