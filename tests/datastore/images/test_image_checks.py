"""What was found of an image holds until the image changes."""

from __future__ import annotations

from pathlib import Path

from lib.datastore.images.checks import ImageCheck, ImageChecks


def test_check_holds_for_the_image_as_it_was_and_for_its_preset(tmp_path: Path) -> None:
    checks = ImageChecks(tmp_path / "checks.sqlite")
    broken, odd = ImageCheck("a", "mr", "1", "it is damaged"), ImageCheck("b", "mr", "1", warning="not HU")
    other = ImageCheck("d", "ct", "1", "it looks like MR", elsewhere=True)
    for check in (broken, odd, ImageCheck("c", "mr", "1"), other):
        checks.keep(check)
    assert checks.find("a", "mr", "1") == broken
    assert (checks.find("a", "mr", "2"), checks.find("a", "ct", "1")) == (None, None)
    assert checks.remarkable() == [broken, odd, other]
    checks.close()
    again = ImageChecks(tmp_path / "checks.sqlite")
    again.forget("a")
    assert (again.of_image("a"), again.of_image("b")) == ([], [odd])
    again.close()
