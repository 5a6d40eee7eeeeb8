"""The acceptance test of a new editor: it is published if its clicks are better at one number of clicks and worse at
none.

The new and the served editor (or region growing, where no editor is served) correct the same masks of the same held-out
cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lib.interaction.evaluation import STOPS
from lib.trainers.judging.gate import Verdict


def judge_clicks(
    new: Mapping[str, Sequence[float]], served: Mapping[str, Sequence[float]], margin: float, against: str
) -> Verdict:
    """Compare a new editor with the one that is served.

    Args:
        new, served: mean Dice of each held-out case at each of :data:`~lib.interaction.evaluation.STOPS`.
        margin: by how much the mean Dice over the cases must be better for at least one number of clicks.
        against: description of what is served.
    """
    cases = sorted(new.keys() & served.keys())
    if not cases:
        return Verdict(
            "unproven",
            "unproven: no held-out case has a label to click on, so nothing judges this editor, and clicks go on with "
            f"{against}. A reviewer who has tried it may serve this version",
        )
    means = {
        name: np.mean([scores[case] for case in cases], axis=0) for name, scores in (("new", new), ("served", served))
    }
    gains = means["new"] - means["served"]
    record = {
        "cases": len(cases), "clicks": list(STOPS), "served": against,
        "champion": [float(v) for v in means["served"]], "challenger": [float(v) for v in means["new"]],
    }  # fmt: skip
    worst, best = int(gains.argmin()), int(gains.argmax())
    words = ", ".join(
        f"{after:.4f} instead of {before:.4f} after {stop}"
        for stop, before, after in zip(STOPS, means["served"], means["new"], strict=True)
    )
    comparison = f"mean Dice {words} clicks on {len(cases)} cases, compared with {against}"
    if gains[worst] < 0:
        return Verdict("rejected", f"rejected: it is worse after {STOPS[worst]} clicks: {comparison}", record)
    if not gains[best] > margin:
        return Verdict(
            "rejected", f"rejected: nowhere better by more than the margin of {margin:g}: {comparison}", record
        )
    return Verdict("published", f"published: {comparison}", record)
