"""What the chosen parts of a cache need of each other, and the one rule by which they are refused.

A part is a gate, a forecaster, a token plan, a calibration, an option. It says which capabilities
it needs, which it offers and which it withholds from the others. Some are there unless a part
withholds them; others are there if a part offers them. Nothing else decides what goes together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum


class Capability(Enum):
    """What one part needs and others offer or withhold.

    Each is described by what it is, what withholding it means, and how to mend its want.
    """

    BLOCKS = (
        "single blocks",
        "stands in for the whole forward pass, which leaves them alone",
        "choose another forecaster",
    )
    WHOLE_STACK = (
        "the whole stack of blocks as one span",
        "cuts it into spans",
        "leave granularity out, or choose another gate",
    )
    ALL_TOKENS = (
        "all tokens of a computed step",
        "leaves some of them out of the blocks",
        "leave out token_plan, enable_spatial_approx, enable_token_merge and their options",
    )
    SOLE_CORRECTION = (
        "to be the only correction of forecasts",
        "corrects them too",
        "give AdaCorrection once",
    )
    SOLE_SCHEDULE = (
        "to say alone which steps are computed",
        "says so too",
        "give one of steps_mask, computed_steps, speedup and quality",
    )
    CALIBRATION = (
        "a calibration",
        "does without one",
        "give calibration='FILE', made by fastcache calibrate",
    )
    GATE_TO_CALIBRATE = (
        "a gate that takes one",
        "takes no calibration",
        "give use_cache='Fast' without test='paper'",
    )
    FORECASTER_TO_CALIBRATE = (
        "a forecaster that takes one",
        "takes no calibration",
        "give forecaster='output'",
    )
    ERROR_BOUND = (
        "a cache_ratio_threshold that bounds an error",
        "bounds no error",
        "give use_cache='Fast' without gate",
    )
    MAPS_TAKER = (
        "a forecaster or token plan that takes linear maps",
        "takes none",
        "give forecaster='linear_taylor' or 'linear', or leave forecaster out",
    )

    @property
    def words(self) -> str:
        """What it is."""
        return self.value[0]

    @property
    def withheld(self) -> str:
        """What a part does that withholds it."""
        return self.value[1]

    @property
    def mend(self) -> str:
        """How to come by it."""
        return self.value[2]


C = Capability
# There where a part offers them; the others are there unless a part withholds them.
OFFERED = frozenset({C.CALIBRATION, C.MAPS_TAKER})


@dataclass(frozen=True)
class Part:
    """One of the things that were chosen.

    Attributes:
        label: as it was asked for, such as `forecaster='output'`.
        needs: capabilities that the others have to leave or give it.
        withholds: capabilities that nobody has beside it.
        offers: those of `OFFERED` that it gives.
    """

    label: str
    needs: Collection[Capability] = ()
    withholds: Collection[Capability] = ()
    offers: Collection[Capability] = ()


def refuse_contradictions(parts: Iterable[Part]) -> None:
    """Refuse parts of which one needs what another withholds, or what nobody offers.

    Raises:
        ValueError: naming both, and how to mend it.

    Example:
        >>> refuse_contradictions([Part("granularity=3", needs={C.BLOCKS}),
        ...                        Part("forecaster='output'", withholds={C.BLOCKS})])
        Traceback (most recent call last):
        ...
        ValueError: granularity=3 does not go with forecaster='output': it needs single blocks, \
and forecaster='output' stands in for the whole forward pass, which leaves them alone; leave one \
of them out, or choose another forecaster
    """
    parts = list(parts)
    for part in parts:
        for needed in sorted(part.needs, key=list(Capability).index):
            for other in parts:
                if other is not part and needed in other.withholds:
                    raise ValueError(
                        f"{part.label} does not go with {other.label}: it needs {needed.words}, "
                        f"and {other.label} {needed.withheld}; leave one of them out, or "
                        f"{needed.mend}"
                    )
            if needed in OFFERED and not any(needed in other.offers for other in parts):
                raise ValueError(f"{part.label} needs {needed.words}; {needed.mend}")
