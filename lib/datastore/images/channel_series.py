"""Assigns the DICOM series of a study to the channels of a case; the id of the case is the UID of the displayed
series.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lib.configs.preset import Channel, Preset
from lib.dicom.matching import has_pattern
from lib.dicom.sources import SeriesInfo
from lib.transforms.channel_search import channel_named
from lib.transforms.channels import missing_channels

RANGE = re.compile(r"(?P<low>-?\d*\.?\d*)\.\.(?P<high>-?\d*\.?\d*)")


@dataclass(frozen=True)
class SeriesCase:
    """The series of a study that are the channels of one case for a preset.

    Attributes:
        shown: UID of the displayed series, which represents the case.
        series: channel name to UID.
        missing: names of required channels that the study lacks.
        problem: why the case cannot be used; empty if it can.
        notes: notes for the user on the geometry of the series.
    """

    shown: str
    series: Mapping[str, str]
    missing: tuple[str, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()


class SeriesCases:
    """The cases among all series, for the presets with channels.

    Args:
        presets: the served presets; of those with channels, the first that matches a study defines the displayed
            series.
        series: all series, by UID.
    """

    def __init__(self, presets: Sequence[Preset], series: Mapping[str, SeriesInfo]) -> None:
        self._cases: dict[str, dict[str, SeriesCase]] = defaultdict(dict)
        self._channel_of: dict[str, tuple[str, str]] = {}
        studies: dict[str, list[SeriesInfo]] = defaultdict(list)
        for info in series.values():
            studies[info.study].append(info)
        for preset in presets if any(preset.channels for preset in presets) else ():
            for study in studies.values() if preset.channels else ():
                for case in _cases_of(preset, study):
                    self._add(preset, case)

    def _add(self, preset: Preset, case: SeriesCase) -> None:
        shown = self._channel_of.get(case.shown, (case.shown, ""))[0]
        self._cases[shown][preset.name] = case
        for name, uid in case.series.items():
            if uid != shown and uid not in self._cases:
                self._channel_of.setdefault(uid, (shown, name))

    def of(self, uid: str) -> Mapping[str, SeriesCase]:
        """For each preset name, the case that a series represents; empty if it represents none."""
        return self._cases.get(uid, {})

    def channel_of(self, uid: str) -> tuple[str, str] | None:
        """The case and the channel of a series that does not represent its case; None for other series."""
        return self._channel_of.get(uid)

    def series_of(self, uid: str) -> set[str]:
        """The other series that are read for a case."""
        return {other for case in self.of(uid).values() for other in case.series.values()} - {uid}


def is_channel(info: SeriesInfo, channel: Channel) -> bool:
    """Whether a series matches the rules of a channel."""
    return all(_fits(info.matched.get(keyword, ()), rule) for keyword, rule in channel.series.asked().items())


def _fits(values: Iterable[str], rule: str) -> bool:
    limits = RANGE.fullmatch(rule)
    if limits is None:
        return any(has_pattern(value, rule) for value in values)
    low, high = float(limits["low"] or "-inf"), float(limits["high"] or "inf")
    return any(low <= number <= high for value in values if (number := _number(value)) is not None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cases_of(preset: Preset, study: Sequence[SeriesInfo]) -> list[SeriesCase]:
    """The case of a study; if several series could be displayed, one case for each, none of which can be used."""
    candidates: dict[str, list[SeriesInfo]] = defaultdict(list)
    for info in study:
        for name in _channels_of(info, preset):
            candidates[name].append(info)
    display = preset.channels[preset.display_channel].name
    problem = "; ".join(_two_series(name, several) for name, several in candidates.items() if len(several) > 1)
    cases = []
    for info in candidates.get(display, []):
        chosen = {name: several[0] for name, several in candidates.items() if len(several) == 1} | {display: info}
        series = {channel.name: chosen[channel.name].uid for channel in preset.channels if channel.name in chosen}
        notes = [_other_frame(name, other, display, info) for name, other in chosen.items()]
        missing = missing_channels(candidates, preset)
        cases.append(SeriesCase(info.uid, series, missing, problem, tuple(note for note in notes if note)))
    return cases


def _channels_of(info: SeriesInfo, preset: Preset) -> list[str]:
    """The channels whose rules a series matches; without rules, the channel named in its description."""
    by_rule = [channel.name for channel in preset.channels if channel.series.asked() and is_channel(info, channel)]
    if by_rule:
        return by_rule
    name = channel_named(" ".join(info.matched.get("SeriesDescription", ())), preset)
    with_rules = {channel.name for channel in preset.channels if channel.series.asked()}
    return [name] if name is not None and name not in with_rules else []


def _two_series(channel: str, series: Sequence[SeriesInfo]) -> str:
    named = " and ".join(f"{info.shown.get('SeriesDescription', '')!r} ({info.uid})" for info in series)
    return f"has several series for the channel {channel!r}: {named}; the preset's rules (series) must choose one"


def _other_frame(name: str, other: SeriesInfo, display: str, shown: SeriesInfo) -> str:
    """A sentence if two series have different frames of reference, so that their positions are not comparable."""
    ours, theirs = (info.matched.get("FrameOfReferenceUID", ("",))[0] for info in (shown, other))
    if not ours or not theirs or ours == theirs:
        return ""
    return f"channel {name} has another frame of reference than {display}: whether they lie on each other is not known"
