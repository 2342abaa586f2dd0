"""What one run of the benchmark measures, and where."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In the folder of the embedded toys.
TOY_PROMPTS = "prompts_64.txt"

# Numbers of computed steps that methods are compared at, of 28.
COUNTS = (14, 10, 8, 7, 6, 5)

# Layout word -> flag of xDiT that takes the degree; cfg takes none.
DEGREES = {
    "ulysses": "--ulysses_degree",
    "ring": "--ring_degree",
    "pipefusion": "--pipefusion_parallel_degree",
    "data": "--data_parallel_degree",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run, the same for all of its processes; `--resume` goes on only with equal settings.

    Attributes:
        model: folder or hub name.
        prompts: one a picture; picture i starts from the noise of seed + i.
        methods: {name: its settings, as text}.
        steps: of the reference, which is also what caches run with.
        converged: how many times as many steps the converged run takes.
        batch_size: prompts of one call, a round.
        call: further arguments of the pipeline's call.
        seed: of the first picture's noise.
        dtype: of the pipeline.
        layout: {word: degree}; empty for plain diffusers in one process.
        workers: processes that share the rounds.
        calibration: file of `fastcache calibrate` for the calibrated methods; "" without one.
    """

    model: str
    prompts: list[str]
    methods: dict[str, list[str]]
    steps: int
    converged: int
    batch_size: int
    call: dict[str, Any]
    seed: int
    dtype: str
    layout: dict[str, int]
    workers: int
    calibration: str = ""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt; give a file with one a line, or --num_prompts")
        least = {"steps": 2, "converged": 1, "batch_size": 1, "workers": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {minimum}")

    @property
    def rounds(self) -> list[list[int]]:
        """Indices of the prompts of each round."""
        indices = list(range(len(self.prompts)))
        return [indices[i : i + self.batch_size] for i in indices[:: self.batch_size]]

    @property
    def ranks(self) -> int:
        """Processes of one layout."""
        return math.prod(self.layout.values())

    def layout_flags(self) -> list[str]:
        """The layout as flags of xDiT."""
        flags = []
        for word, degree in self.layout.items():
            if word == "cfg":
                flags.append("--use_cfg_parallel")
            else:
                flags += [DEGREES[word], str(degree)]
        return flags

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def differences(self, other: Settings) -> list[str]:
        """Names of the fields that differ; the number of workers may."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "workers"]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def parse_layout(text: str) -> dict[str, int]:
    """Read `"ulysses=2,pipefusion=2"`.

    Raises:
        ValueError: an unknown word, or a degree that is no number above 1.
    """
    layout = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        word, _, degree = part.partition("=")
        if word not in (*DEGREES, "cfg") or not degree.isdigit() or int(degree) < 2:
            raise ValueError(
                f"--layout {part!r} is no WORD=DEGREE with a degree of at least 2; words: "
                f"{', '.join((*DEGREES, 'cfg'))}, e.g. --layout ulysses=2,pipefusion=2"
            )
        if word == "cfg" and int(degree) != 2:
            raise ValueError(f"--layout cfg={degree}: guidance has two branches; give cfg=2")
        layout[word] = int(degree)
    return layout


def calibration_of(model: str) -> str:
    """The calibration that lies in a model's folder; "" without one."""
    path = Path(model) / "fastcache.safetensors"
    return str(path) if path.exists() else ""
