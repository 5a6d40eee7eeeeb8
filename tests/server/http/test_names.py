from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi import Response
from monailabel.datastore.local import LocalDatastore

from lib.errors import NotFoundError, ParameterError
from lib.server.http.errors import ForbiddenError
from lib.server.http.names import (
    as_attachment,
    check_new_id,
    check_tag,
    find_image,
    find_label,
    safe_file_name,
    safe_new_id,
)
from tests.tiny import boxes, write_nifti

HOSTILE = ("", ".", "..", "../a", "a/b", "a\\b", "/etc/passwd", ".hidden", "a\0b", "a b", "ä", "a" * 129, "a\n", "C:x")


@pytest.mark.parametrize("text", [*HOSTILE, "a.", "con", "COM1.x", "a.nii", "a.nii.gz", "b.nrrd.x", "store.json"])
def test_new_id_that_is_no_plain_name_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="'image'"):
        check_new_id(text)


@pytest.mark.parametrize("text", ["a", "case_001", "1.2.840.113619", "A-b_c.d", "-x", "n" * 128])
def test_new_id_that_is_a_plain_name_is_taken(text: str) -> None:
    assert check_new_id(text) == text


@pytest.mark.parametrize(
    ("text", "kept"), [("3: AX T1 POST", "3_AX_T1_POST"), ("2: b1000 (ADC)", "2_b1000_ADC_"), ("ä", "_"), ("a", "a")]
)
def test_name_that_a_client_has_for_an_image_becomes_a_safe_id(text: str, kept: str) -> None:
    assert safe_new_id(text) == kept


@pytest.mark.parametrize(
    "text", ["", "..", "../a", "a/b", "a\\b", ".hidden", "a\0b", "a" * 129, "a\n", "con", "a b.nii"]
)
def test_name_that_leads_elsewhere_or_is_reserved_is_no_safe_id(text: str) -> None:
    with pytest.raises(ParameterError, match="'image'"):
        safe_new_id(text)


@pytest.mark.parametrize("text", [*HOSTILE[1:], "Final", "a.b", "t" * 33, "con", "lpt1"])
def test_tag_that_is_no_plain_name_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="'tag'"):
        check_tag(text)


def test_no_tag_means_final() -> None:
    assert (check_tag(None), check_tag(""), check_tag("original")) == ("final", "final", "original")


@pytest.mark.parametrize(
    ("sent", "safe"),
    [
        ("/home/anna/scan.nii.gz", "scan.nii.gz"),
        ("C:\\scans\\brain 1.nii", "brain_1.nii"),
        ("../../etc/passwd", "passwd"),
        ("....nii.gz", "nii.gz"),
        ("..", "image.nii.gz"),
        ("", "image.nii.gz"),
        (None, "image.nii.gz"),
        ("a\0b\n.nii", "a_b_.nii"),
        ("x" * 300 + ".nii.gz", "x" * 93 + ".nii.gz"),
    ],
)
def test_file_name_is_made_harmless(sent: str | None, safe: str) -> None:
    assert safe_file_name(sent, "image.nii.gz") == safe


@pytest.mark.parametrize(
    "name",
    ["a.nii.gz", "\u809d.nii.gz", "\u00e4.nii.gz", 'quo"te.nii.gz', "new\r\nX-Evil: 1.nii.gz", "50%.nii.gz", "\u202e"],
)
def test_answer_is_saved_under_the_name_that_the_file_has_whatever_it_is(name: str) -> None:
    """A name that Latin-1 does not have made the uncertainty of such an image a 500."""
    said = Response(headers=as_attachment(name)).headers["content-disposition"]
    assert said.isascii() and said.isprintable()
    plain = said.removeprefix("attachment; ").removeprefix('filename="').removesuffix('"')
    assert unquote(plain.removeprefix("filename*=utf-8''")) == name


@pytest.fixture
def store(tmp_path: Path) -> LocalDatastore:
    write_nifti(tmp_path / "studies" / "case.nii.gz", boxes()[0])
    outside = write_nifti(tmp_path / "outside" / "secret.nii.gz", boxes()[0])
    (tmp_path / "studies" / "linked.nii.gz").symlink_to(outside)
    return LocalDatastore(str(tmp_path / "studies"))


def test_known_image_is_found(store: LocalDatastore, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    assert find_image(store, "case", str(studies), ()) == studies.resolve() / "case.nii.gz"


@pytest.mark.parametrize("text", [*HOSTILE, "nope", "case.nii.gz"])
def test_unknown_image_is_not_found(store: LocalDatastore, tmp_path: Path, text: str) -> None:
    with pytest.raises(NotFoundError, match="there is no image"):
        find_image(store, text, str(tmp_path / "studies"), ())


def test_link_out_of_the_studies_is_refused_unless_allowed(store: LocalDatastore, tmp_path: Path) -> None:
    studies, outside = str(tmp_path / "studies"), tmp_path / "outside"
    with pytest.raises(ForbiddenError, match="image 'linked' lies outside the studies folder") as refused:
        find_image(store, "linked", studies, ())
    assert "secret" not in str(refused.value)
    assert find_image(store, "linked", studies, (outside,)) == (outside / "secret.nii.gz").resolve()


def test_path_is_taken_only_inside_an_allowed_root(store: LocalDatastore, tmp_path: Path) -> None:
    studies, outside = str(tmp_path / "studies"), tmp_path / "outside"
    secret = outside / "secret.nii.gz"
    assert find_image(store, str(secret), studies, (outside,)) == secret
    for path in (secret, outside / ".." / "studies" / "case.nii.gz"):
        roots = () if path == secret else (outside,)
        with pytest.raises(NotFoundError):
            find_image(store, str(path), studies, roots)


def test_image_whose_file_is_gone_is_not_found(store: LocalDatastore, tmp_path: Path) -> None:
    (tmp_path / "studies" / "case.nii.gz").unlink()
    with pytest.raises(NotFoundError, match="image file of 'case'"):
        find_image(store, "case", str(tmp_path / "studies"), ())


def test_label_is_found_only_where_there_is_one(store: LocalDatastore, tmp_path: Path) -> None:
    file = write_nifti(tmp_path / "label.nii.gz", boxes()[1])
    store.save_label("case", str(file), "final", {})
    assert find_label(store, "case", "final").name == "case.nii.gz"
    for image, tag in (("case", "original"), ("nope", "final"), ("../case", "final"), ("case", "..")):
        with pytest.raises(NotFoundError, match="there is no label"):
            find_label(store, image, tag)
