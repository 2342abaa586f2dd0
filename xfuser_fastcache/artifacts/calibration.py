"""What a calibration leaves behind: one safetensors file, read whole or refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xfuser_fastcache.artifacts.file import Kind, read_file, write_file
from xfuser_fastcache.config.checks import LARGEST, is_number

# Of the layout of the file.
VERSION = 7
CALIBRATION = Kind("calibration", "fastcache calibrate", "version", VERSION, unsealed=6)
# The plan's noise levels are compared in this precision.
TOLERANCE = 1e-5
_ABOVE_0 = 1e-300
LARGEST_POWER = 8.0  # Of change and energy: errors grow with some root of either.
_WEIGHT = 1e6  # Forecasts are about as large as what they are made of.
# Name -> type, least and most of a table's values; none is NaN.
_TABLES = {
    "noise_levels": (np.float64, 0.0, _WEIGHT),
    "weights": (np.float32, -_WEIGHT, _WEIGHT),
    "slopes": (np.float64, 0.0, math.inf),
    "degrees": (np.float64, _ABOVE_0, math.inf),
    "steering": (np.float32, -_WEIGHT, _WEIGHT),
    "steering_guided": (np.float32, -_WEIGHT, _WEIGHT),
}
# Of earlier releases, whose last stage of a pipeline did not see the latents; no longer asked for.
_FORMER = {"weights_blind", "steering_blind"}
# These travel in the metadata.
_NUMBERS = ("exponents", "upper", "scales", "masks")

# What `layout` in the metadata says where PipeFusion took no part.
WITHOUT_STAGES = "without PipeFusion"

# What the metadata says of the model and of the test; a file for others is refused.
MODEL_KEYS = ("model", "model_config", "blocks", "weights", "dtype_family")
_FAMILIES = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half"}


class Cell(NamedTuple):
    """Where a forecast stands.

    Attributes:
        step: of the plan.
        lag: steps from the anchor to it, less one.
        spacing: steps from the anchor before to the anchor; 0 where there is no anchor before.
    """

    step: int
    lag: int
    spacing: int


class TrajectoryCorrection(NamedTuple):
    """Corrections for one mask of computed steps.

    Attributes:
        mask: 1 for computed, `T` entries.
        weights: see `Fitted.steering`, `(T, 5)`.
        guided: see `Fitted.steering_guided`, `(T, 2, 5)`; None without any.
    """

    mask: list[int]
    weights: NDArray[np.float32]
    guided: NDArray[np.float32] | None = None

    def row(self, step: int, anchors: Sequence[int], computed: bool) -> int | None:
        """Return which row of the weights a step takes; None where nothing was fitted.

        A stage that is a step ahead in the mask (`stagger_stages`) has computed the step before a
        computed one: there and from there on it stands to its anchors as the mask does at the next
        step.

        Args:
            step: that is forecast or computed.
            anchors: steps that were computed, newest first; that step itself where it is.
            computed: whether it is.
        """
        row = step if all(self.mask[anchor] for anchor in anchors) else step + 1
        fits = row < len(self.mask) and bool(self.mask[row]) == computed
        return row if fits and self.weights[row].any() else None


@dataclass(frozen=True)
class Fitted:
    """Fitted corrections of the output forecast, thresholds, and searched masks of steps.

    `T` is the number of steps, `G` the largest lag between anchors that was looked at, `M` the
    number of masks. Tables go by `Cell`, so their shape is `(T, G, G + 1, ...)`.

    Attributes:
        noise_levels: of the plan, `(T,)`.
        weights: of the last output's change, the latents' change, the last output and the latents,
            added to the extrapolated output, `(T, G, G + 1, 4)`; all 0 where the extrapolation
            alone was better on generations that were held out.
        slopes: median of true relative error over delta and rho, each to its power,
            `(T, G, G + 1)`; infinite where nothing was seen.
        degrees: degrees of freedom of the predicted squared error, same shape.
        exponents: powers of delta, the relative change of the latents, and of rho, their root
            mean square at the anchor; one pair for all cells.
        upper: of true over predicted errors, an upper quantile, one for all cells.
        scales: alpha -> lambda of the conformal test at it; 0 where it allows no skip.
        masks: number of computed steps -> which ones, 1 for computed, `T` entries each.
        steering: corrections for the masks, in ascending order of their computed steps,
            `(M, T, 5)`: weights as in `weights`, then one of the change between the two outputs
            before the last; empty, `(0, T, 5)`, where the masks take the cells' corrections. At a
            computed step the last output is that step's own, and changes are those since the
            computed step before.
        steering_guided: as `steering`, of the pictures of a batch without guidance and of those
            with it, fitted together where a call of the transformer held both, `(M, T, 2, 5)`;
            empty, `(0, T, 2, 5)`, where it did not.
        metadata: what the file was made of and for; see `fastcache calibrate`.
        digest: of the file's content, in hexadecimal.
    """

    noise_levels: NDArray[np.float64]
    weights: NDArray[np.float32]
    slopes: NDArray[np.float64]
    degrees: NDArray[np.float64]
    exponents: tuple[float, float]
    upper: float
    scales: dict[float, float]
    masks: dict[int, list[int]]
    steering: NDArray[np.float32]
    steering_guided: NDArray[np.float32]
    metadata: dict[str, Any]
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        steps, lags = self.slopes.shape[:2] if self.slopes.ndim == 3 else (0, 0)
        cells = (steps, lags, lags + 1)
        wanted = {
            "noise_levels": (steps,),
            "weights": (*cells, 4),
            "slopes": cells,
            "degrees": cells,
        }
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape or 0 in shape:
                raise ValueError(f"{name} has the shape {found}, and the other tables want {shape}")
        weights = {"steering": (5,), "steering_guided": (2, 5)}
        for name, last in weights.items():
            found = getattr(self, name).shape
            if found not in ((0, steps, *last), (len(self.masks), steps, *last)):
                raise ValueError(
                    f"{name} has the shape {found}, for {len(self.masks)} masks of {steps} steps"
                )
        for count, mask in self.masks.items():
            if len(mask) != steps or sum(mask) != count:
                raise ValueError(f"the mask of {count} steps is {mask}, for {steps} steps")

    def cell(self, noise_level: float, anchor: float, older: float | None) -> Cell | None:
        """Return the cell of a forecast; None where the calibration has not looked.

        Args:
            noise_level: of the step that is forecast.
            anchor: of the last computed step.
            older: of the computed step before that, or None.
        """
        step, at = self.step_at(noise_level), self.step_at(anchor)
        before = at if older is None else self.step_at(older)
        if step is None or at is None or before is None:
            return None
        lag, spacing = step - at - 1, at - before
        most = self.slopes.shape[1]
        if not 0 <= lag < most or not 0 <= spacing <= most:
            return None
        return Cell(step, lag, spacing)

    def predicted_error(self, cell: Cell, change: float, energy: float) -> float | None:
        """Return the relative error that a skip is predicted to make.

        Args:
            cell: of the forecast.
            change: squared relative change of the latents, not below 0.
            energy: mean square of the latents at the anchor, above 0.

        Returns:
            None in a cell that was not seen, and where nothing has changed at all and its exponent
            is below 0: no generation of the calibration was like that.
        """
        slope, (of_change, of_energy) = float(self.slopes[cell]), self.exponents
        if np.isinf(slope) or (change == 0 and of_change < 0):
            return None
        return slope * float(change ** (of_change / 2) * energy ** (of_energy / 2))

    def trajectory_correction(self, mask: list[int] | None) -> TrajectoryCorrection | None:
        """Return the corrections made for a mask; None without any."""
        table, guided = self.steering, self.steering_guided
        for place, count in enumerate(sorted(self.masks)[: len(table)]):
            if self.masks[count] == mask:
                own = guided[place] if len(guided) else None
                return TrajectoryCorrection(self.masks[count], table[place], own)
        return None

    def step_at(self, noise_level: float) -> int | None:
        """Return the step of the plan that has this noise level, or None."""
        nearest = int(np.abs(self.noise_levels - noise_level).argmin())
        return nearest if abs(self.noise_levels[nearest] - noise_level) < TOLERANCE else None

    def differs_from(self, planned: list[float]) -> str | None:
        """Say how a plan's noise levels differ from the calibration's; None where they do not."""
        if not planned:
            return f"it plans {len(self.noise_levels)} steps, and this one's plan is not known"
        if len(planned) != len(self.noise_levels):
            return f"it plans {len(self.noise_levels)} steps, this one {len(planned)}"
        gap = np.abs(self.noise_levels - planned)
        if gap.max() < TOLERANCE:
            return None
        step = int(gap.argmax())
        return (
            f"step {step} has the noise level {self.noise_levels[step]:.5f} there and "
            f"{planned[step]:.5f} here"
        )

    @property
    def options(self) -> dict[str, Any]:
        """What it knows of options in place of those that are not given; see `CacheConfig`."""
        return {
            "test": "conformal",
            "num_warmup_steps": 1,
            "max_consecutive_skips": self.most_skips,
            "cache_ratio_threshold": self.metadata["cache_ratio_threshold"],
        }

    @property
    def most_skips(self) -> int:
        """Most steps in a row that the calibration has looked at."""
        return self.slopes.shape[1]

    @property
    def of_stages(self) -> bool:
        """Whether it was made under PipeFusion, on its pictures."""
        return self.metadata.get("layout", WITHOUT_STAGES) != WITHOUT_STAGES

    def save(self, path: str | Path) -> None:
        """Write the file in one go: another process sees all of it or nothing."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        tables = {name: getattr(self, name) for name in _TABLES}
        write_file(path, CALIBRATION, tables, {**self.metadata, **numbers})


def load_fitted(path: str | Path) -> Fitted:
    """Read a calibration file.

    Raises:
        ValueError: no such file, one of which a byte is missing or has changed, or one that is no
            calibration; with the reason.
    """
    held, meta, digest = read_file(path, CALIBRATION)
    held = {name: table for name, table in held.items() if name not in _FORMER}
    if set(held) != set(_TABLES):
        raise ValueError(
            f"{str(path)!r} holds {', '.join(sorted(held))}, and a calibration "
            f"{', '.join(sorted(_TABLES))}. Make it anew with fastcache calibrate"
        )
    try:
        found = Fitted(
            **held,
            exponents=tuple(meta.pop("exponents")),
            upper=meta.pop("upper"),
            scales={float(alpha): scale for alpha, scale in meta.pop("scales").items()},
            masks={int(count): mask for count, mask in meta.pop("masks").items()},
            metadata=meta,
            digest=digest,
        )
        _refuse_wrong_values(found)
        return found
    # Numbers may be of any type that JSON has.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} contradicts itself: {error}") from error


def _refuse_wrong_values(fitted: Fitted) -> None:
    """Refuse values that no calibration has, and that would fail within a generation.

    Raises:
        ValueError: naming the value.
    """
    for name, (dtype, least, most) in _TABLES.items():
        table = getattr(fitted, name)
        if table.dtype != dtype or not ((table >= least) & (table <= most)).all():
            raise ValueError(
                f"{name} is a table of {table.dtype} with values outside of {least:g} to {most:g}, "
                f"or of another type than {np.dtype(dtype)}"
            )
    single = {"upper": (fitted.upper, _ABOVE_0, _WEIGHT)}
    single |= {
        f"exponents[{i}]": (e, -LARGEST_POWER, LARGEST_POWER)
        for i, e in enumerate(fitted.exponents)
    }
    single |= {f"the scale of alpha = {a}": (s, 0.0, _WEIGHT) for a, s in fitted.scales.items()}
    single |= {f"alpha = {alpha}": (alpha, _ABOVE_0, 1.0) for alpha in fitted.scales}
    for name, (value, least, most) in single.items():
        if not is_number(value) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}; allowed: {least:g} to {most:g}")
    if len(fitted.exponents) != 2:
        raise ValueError(f"there are {len(fitted.exponents)} exponents; allowed: 2")
    for mask in fitted.masks.values():
        if not all(entry in (0, 1) and isinstance(entry, int) for entry in mask) or not mask[0]:
            raise ValueError(f"the mask {mask} is no list of 0 and 1 that begins with 1")
    epsilon: Any = fitted.metadata.get("cache_ratio_threshold")
    if not is_number(epsilon) or not 0 <= epsilon <= LARGEST:
        raise ValueError(f"cache_ratio_threshold is {epsilon!r}; allowed: 0 to {LARGEST:g}")


def fingerprint(model: Any, family: str, embedder: str, blocks: int) -> dict[str, str]:
    """Return what a calibration is bound to: class, configuration, blocks, weights, dtype family.

    Every stage of a pipeline finds the same in what it holds.

    Args:
        model: the diffusers transformer, or a pipeline stage's part of one.
        family: name of its class.
        embedder: name of a submodule that every stage holds whole; its weights stand for all.
        blocks: number of blocks of the whole model.
    """
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    weights = hashlib.sha256()
    for name, parameter in sorted(model.get_submodule(embedder).named_parameters()):
        # Signs, which rounding leaves alone: float16 and bfloat16 of one checkpoint agree in no
        # number of bits. Another training turns some.
        signs = parameter.detach().float().signbit().cpu()
        weights.update(name.encode() + signs.numpy().tobytes())
    dtype = next(model.parameters()).dtype
    found = (
        family,
        hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        str(blocks),
        weights.hexdigest()[:16],
        _FAMILIES.get(dtype, str(dtype)),
    )
    return dict(zip(MODEL_KEYS, found, strict=True))


def check_model(metadata: dict[str, Any], path: str, kind: Kind, found: dict[str, str]) -> None:
    """Refuse a file that was made for another model.

    Args:
        metadata: of the file.
        path: of the file.
        kind: of the file.
        found: what `fingerprint` finds here.

    Raises:
        ValueError: naming what differs.
    """
    wrong = [
        f"{key.replace('_', ' ')}: {metadata.get(key)} in the file, {found[key]} here"
        for key in MODEL_KEYS
        if metadata.get(key) != found[key]
    ]
    if wrong:
        raise ValueError(
            f"the {kind.option} {path!r} was made for another model ({'; '.join(wrong)}); make one "
            f"for this model with {kind.script}"
        )
