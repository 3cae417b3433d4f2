"""Method "auto": how far the backbone is from the data decides whether it is to be kept in mind.

Its gates and low-rank updates of every layer serve near targets and far ones. What differs is the rest of the world. A
backbone that is near is at the level of theory of the labels, and what it knows of other molecules is worth keeping:
they are replayed. A backbone that is far is at another level, and holding on to it would hold back the step between the
levels, which other molecules gain by too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..potential import Potential
from .samples import Samples

AUTO = "auto"
# On five molecules of rMD17 the gap is 0.05 to 0.14 for the backbone of the labels' level of theory, 0.35 to 0.47
# for that of GFN2-xTB.
NEAR = 0.25
REPLAY = 10
SAMPLE = 50


@dataclass(frozen=True)
class Decision:
    """What was decided, and why.

    Attributes:
        gap: mean absolute error of the backbone's forces over the mean magnitude of the labels' (components); None
            where no structure has forces.
        replay: other molecules in every epoch.
        why: the reason, a sentence.
    """

    gap: float | None
    replay: int
    why: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(potential: Potential, samples: Samples, training: TrainConfig) -> tuple[TrainConfig, Decision]:
    """Settle `TrainConfig.replay` where it was left open.

    Args:
        potential: before any training.
        samples: training structures; the gap is that of `SAMPLE` of them, evenly spaced.
        training: what was asked for.
    """
    gap = _gap(potential, samples)
    if training.replay is not None:
        decision = Decision(gap, training.replay, "the number of replayed molecules was given")
    elif gap is None:
        decision = Decision(gap, 0, "without forces in the data the gap is not known, and nothing is replayed")
    elif gap < NEAR:
        decision = Decision(
            gap,
            REPLAY,
            f"the backbone's forces are off by {gap:.0%} of their size, less than {NEAR:.0%}: it is near, and what it "
            f"knows of other molecules is kept by replaying {REPLAY} of them in every epoch",
        )
    else:
        decision = Decision(
            gap,
            0,
            f"the backbone's forces are off by {gap:.0%} of their size, at least {NEAR:.0%}: it is far, presumably at "
            "another level of theory, and nothing of it is replayed",
        )
    return replace(training, replay=decision.replay), decision


def _gap(potential: Potential, samples: Samples) -> float | None:
    places = np.unique(np.linspace(0, len(samples) - 1, min(SAMPLE, len(samples))).round().astype(int)).tolist()
    labels = [samples.structures[i].forces for i in places]
    chosen = [(i, label) for i, label in zip(places, labels, strict=True) if label is not None]
    if not chosen:
        return None
    _, forces = potential.predict_graphs([samples.graphs[i] for i, _ in chosen])
    error = np.concatenate([np.abs(f.numpy() - label) for f, (_, label) in zip(forces, chosen, strict=True)])
    size = np.concatenate([np.abs(label) for _, label in chosen]).mean()
    return float(error.mean() / size) if size > 0 else None
