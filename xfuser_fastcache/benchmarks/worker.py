"""One process of the benchmark, or one rank of a layout: takes its rounds and writes records.

    python -m xfuser_fastcache.benchmarks.worker OUTPUT_DIR WORKER [--try METHOD]

A round is one batch of prompts: the converged run, the uncached run, then every setting of every
method once, in an order of the round's own, with the uncached run timed anew in between. A record
is a line of JSON, written at once, so that an interrupted run keeps what it has measured.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from xfuser_fastcache.benchmarks import quality
from xfuser_fastcache.benchmarks.methods import Method, all_methods
from xfuser_fastcache.benchmarks.settings import Settings
from xfuser_fastcache.benchmarks.subject import Sample, Subject, load_subject
from xfuser_fastcache.reports.clips import are_clips, save_animation
from xfuser_fastcache.reports.measured import environment, picture_of
from xfuser_fastcache.xdit.loaded import finish

# Settings between two timings of the uncached run: the machine's mood changes slowly.
TIMED_ANEW = 12
# Steps of the first try of a method, enough for every peer's first skip.
TRIED_STEPS = 8
# What figures depend on.
PACKAGES = ("torch", "diffusers", "transformers")
# Pictures kept of each setting, from the first round.
KEPT = 4

Point = tuple[int, str, str]


class Records:
    """Appends records to one file of this worker; ranks other than the first write nothing."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, **record: Any) -> None:
        """Write one record as one line."""
        if self._stream is not None:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()


def read_records(directory: Path) -> list[dict[str, Any]]:
    """All records of a run so far; a line that was cut off while it was written is left out."""
    found = []
    for path in sorted(directory.glob("records.*.jsonl")):
        found += [
            json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"
        ]
    return found


def outcomes(records: list[dict[str, Any]]) -> tuple[set[tuple[str, str]], set[Point]]:
    """Return the settings that failed, and the points that are measured."""
    return (
        {(r["method"], r["value"]) for r in records if r["kind"] == "error"},
        {(r["round"], r["method"], r["value"]) for r in records if r["kind"] == "point"},
    )


def tell(error: Exception) -> str:
    """An error as its own words and the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:400]} ({Path(place.filename).name}:{place.lineno})"


class Measurement:
    """Measures rounds on one subject.

    Args:
        subject: the pipeline.
        settings: of the run.
        methods: {name: method}.
        records: where results go.
        pictures: folder of kept pictures; None keeps none.
        failed: (method, setting) that are left out, since they raised before.
    """

    def __init__(
        self,
        subject: Subject,
        settings: Settings,
        methods: dict[str, Method],
        records: Records,
        pictures: Path | None,
        failed: set[tuple[str, str]],
    ):
        self.subject, self.settings, self.methods = subject, settings, methods
        self.records, self.pictures = records, pictures
        self.failed = failed

    def run(self, indices: list[int], method: Method | None, value: str, **changes: Any) -> Sample:
        """Call the pipeline for these prompts, with a method's setting or without any."""
        prompts = [self.settings.prompts[i] for i in indices]
        seeds = [self.settings.seed + i for i in indices]
        self.subject.computed = None if method else float(self.subject.steps)
        if method is None:
            return self.subject.generate(prompts, seeds, **changes)
        with method.prepare(self.subject, value) as own:
            return self.subject.generate(prompts, seeds, **{**changes, **own})

    def warm_up(self) -> None:
        """Try every setting once, drop those that fail, and see that no method leaves a trace.

        Raises:
            RuntimeError: a method changed the pipeline for those after it.
        """
        steps = {"num_inference_steps": min(TRIED_STEPS, self.subject.steps)}
        keys = set(self.subject.model.state_dict())
        before = self.run([0], None, "", **steps).images
        for name, values in self.settings.methods.items():
            for value in values:
                if (name, value) not in self.failed:
                    with self.listed(name, value):
                        method = self.methods[name]
                        self.run([0], method, value, **({} if method.whole_plan else steps))
            after = self.run([0], None, "", **steps).images
            same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
            if not same or set(self.subject.model.state_dict()) != keys:
                raise RuntimeError(
                    f"{name} left the pipeline changed; nothing after it would count"
                )

    @contextmanager
    def listed(self, name: str, value: str) -> Iterator[None]:
        """List a setting that raises with its own error, and go on without it."""
        try:
            yield
        except Exception as error:
            self.failed.add((name, value))
            self.records.write(kind="error", method=name, value=value, error=tell(error))
            traceback.print_exc()

    def measure_round(self, number: int, done: set[Point]) -> None:
        """Measure what is not done yet of one round."""
        points = [
            (name, value)
            for name, values in self.settings.methods.items()
            for value in values
            if (number, name, value) not in done and (name, value) not in self.failed
        ]
        if not points:
            return
        indices = self.settings.rounds[number]
        order = np.random.default_rng(number).permutation(len(points))
        longer = {"num_inference_steps": self.settings.converged * self.subject.steps}
        converged = self.run(indices, None, "", **longer)
        uncached = self.baseline(number, indices, converged)
        self.keep(number, "converged", "", converged)
        self.keep(number, "baseline", "", uncached)
        seconds = uncached.seconds
        for count, at in enumerate(order):
            name, value = points[at]
            if count and count % TIMED_ANEW == 0:
                seconds = self.baseline(number, indices, converged).seconds
            with self.listed(name, value):
                sample = self.run(indices, self.methods[name], value)
                self.keep(number, name, value, sample)
                self.record(number, indices, sample, uncached, converged, seconds, name, value)

    def baseline(self, number: int, indices: list[int], converged: Sample) -> Sample:
        """Time the uncached run and write it down."""
        sample = self.run(indices, None, "")
        self.record(number, indices, sample, sample, converged, sample.seconds, "baseline", "")
        return sample

    def record(
        self,
        number: int,
        indices: list[int],
        sample: Sample,
        uncached: Sample,
        converged: Sample,
        baseline_seconds: float,
        name: str,
        value: str,
    ) -> None:
        """Write one record of one call."""
        if not uncached.images:
            return
        prompts = [self.settings.prompts[i] for i in indices]
        self.records.write(
            kind="point",
            round=number,
            method=name,
            value=value,
            prompts=indices,
            seconds=sample.seconds,
            baseline_seconds=baseline_seconds,
            peak_bytes=sample.peak_bytes,
            computed_steps=self.subject.computed,
            **quality.compare(sample.images, uncached.images, converged.images),
            **quality.marks(prompts, sample.images),
        )

    def keep(self, number: int, name: str, value: str, sample: Sample) -> None:
        """Keep the first round's first pictures as PNG, and clips as moving ones."""
        if self.pictures is None or number:
            return
        for index, image in enumerate(sample.images[:KEPT]):
            path = self.pictures / picture_name(name, value, index)
            if are_clips([image]):
                save_animation([image], path)
            else:
                picture_of(image).save(path)


def picture_name(name: str, value: str, index: int) -> str:
    """File name of a kept picture."""
    return f"{name}_{value.replace('/', '-')}_{index}.png"


def main() -> None:
    """Measure this worker's share of the rounds, or try one method."""
    directory, worker = Path(sys.argv[1]), int(sys.argv[2])
    settings = Settings.read(directory / "settings.json")
    subject = load_subject(settings)
    first = int(os.environ.get("RANK", "0")) == 0
    if sys.argv[3:4] == ["--try"]:
        name = sys.argv[4]
        method = all_methods()[name]
        with method.prepare(subject, settings.methods[name][-1]) as changes:
            steps = {} if method.whole_plan else {"num_inference_steps": TRIED_STEPS}
            subject.generate(settings.prompts[:1], [settings.seed], **{**steps, **changes})
    else:
        failed, done = outcomes(read_records(directory))
        number = len(list(directory.glob("records.*.jsonl"))) if first else 0
        path = directory / f"records.{number:03d}-{worker}.jsonl"
        with open(path, "x") if first else open(os.devnull, "w") as stream:
            records = Records(stream if first else None)
            records.write(kind="environment", **environment(*PACKAGES))
            pictures = directory / "pictures" if first else None
            measurement = Measurement(subject, settings, all_methods(), records, pictures, failed)
            measurement.warm_up()
            for number in range(worker, len(settings.rounds), settings.workers):
                measurement.measure_round(number, done)
    if settings.layout:
        finish()


if __name__ == "__main__":
    main()
