"""Fitted linear maps of the whole stack of blocks: one safetensors file, read whole or refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xfuser_fastcache.artifacts.file import Kind, read_file, write_file
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps

LINEAR_MAPS = Kind("linear_maps", "fastcache fit-maps", "maps_version", version=2, unsealed=1)
STREAMS = ("image", "text")
# Forecasters that maps are fitted for; see `Forecaster.takes_maps`.
MAPPED = ("linear_taylor", "linear")


@dataclass(frozen=True, eq=False)
class FittedMaps:
    """The maps of a stack, for each forecaster that takes any.

    Attributes:
        of: `forecaster` -> its maps, for all of `MAPPED`, with the same edges.
        metadata: what the file was made of and for; see `fastcache fit-maps`.
        digest: of the file's content, in hexadecimal.

    Raises:
        ValueError: maps for tokens of several widths.
    """

    of: dict[str, SpanMaps]
    metadata: dict[str, Any]
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        held = [used for maps in self.of.values() for used in (*maps.image, *maps.text)]
        widths = {used.dim for used in held if used is not None}
        if len(widths) > 1:
            raise ValueError(f"maps are for tokens of widths {sorted(widths)}; allowed: one width")

    def save(self, path: str | Path) -> None:
        """Write the file in one go: another process sees all of it or nothing."""
        tables = {
            name: tensor.cpu().numpy()
            for forecaster, maps in self.of.items()
            for stream in STREAMS
            for bucket, used in enumerate(getattr(maps, stream))
            if used is not None
            for name, tensor in used.to_tensors(_prefix(forecaster, stream, bucket)).items()
        }
        edges = next(iter(self.of.values())).edges
        write_file(path, LINEAR_MAPS, tables, {**self.metadata, "edges": edges})


def load_maps(path: str | Path) -> FittedMaps:
    """Read a file of linear maps.

    Raises:
        ValueError: no such file, one of which a byte is missing or has changed, or one that holds
            no such maps; with the reason.
    """
    tables, metadata, digest = read_file(path, LINEAR_MAPS)
    tensors = {name: torch.from_numpy(table) for name, table in tables.items()}
    try:
        edges = tuple(metadata.pop("edges"))
        prefixes = {
            (forecaster, stream): [_prefix(forecaster, stream, b) for b in range(len(edges))]
            for forecaster in MAPPED
            for stream in STREAMS
        }
        known = {prefix for listed in prefixes.values() for prefix in listed}
        stray = sorted(name for name in tensors if name.rpartition(".")[0] not in known)
        if stray:
            raise ValueError(f"{stray[0]} is unknown; allowed are tensors of {sorted(known)}")
        held = {
            place: tuple(LinearMap.from_tensors(tensors, prefix) for prefix in listed)
            for place, listed in prefixes.items()
        }
        of = {name: SpanMaps(edges, held[name, "image"], held[name, "text"]) for name in MAPPED}
        return FittedMaps(of, metadata, digest)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} contradicts itself: {error}") from error


def _prefix(forecaster: str, stream: str, bucket: int) -> str:
    return f"{forecaster}.{stream}.{bucket}"
