"""Write the toy models to a folder: trained pipelines of 1 to 2 million weights, to try things on.

    fastcache toys toys                                              # in a checkout
    fastcache toys toys --source xfuser_fastcache-0.2.0.tar.gz       # from an sdist
    fastcache generate --model toys/flux --prompt "a large red ring" --use_cache Fast

The wheel has none of them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from xfuser_fastcache.calibration.checkout import toys_of_checkout
from xfuser_fastcache.cli.flags import flags_of

# A pipeline of diffusers begins with it.
_MARK = "model_index.json"
# How the toys were trained stays behind.
_LEFT = ("training", "__pycache__")


def main(arguments: list[str]) -> int:
    """Write the toys; return the exit status.

    Raises:
        ValueError: no toys are there to be written.
        FileExistsError: a toy's folder exists already.
    """
    flags = flags_of("fastcache toys", __doc__)
    flags.add_argument("directory", type=Path, help="where each toy gets a folder")
    flags.add_argument(
        "--source", type=Path, help="a checkout's folder, or an sdist; default this checkout"
    )
    options = flags.parse_args(arguments)
    found = dict(_files(options.source))
    names = sorted(path.parts[0] for path in found if path.name == _MARK)
    if not names:
        raise ValueError(
            "the toys are in a checkout of the project or in its sdist, not in the wheel; give one "
            f"of them by --source (now {options.source or 'none'})"
        )
    for name in names:
        (options.directory / name).mkdir(parents=True)
    for path, content in found.items():
        if path.parts[0] in names:
            target = options.directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    print(f"written: {', '.join(str(options.directory / name) for name in names)}")
    return 0


def _files(source: Path | None) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the files of folders in `toys/`, by their path below it."""
    if source is not None and source.is_file():
        with tarfile.open(source) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parts[1:2] == ("toys",) and _is_kept(path.parts[2:]):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    yield PurePosixPath(*path.parts[2:]), content.read()
        return
    toys = toys_of_checkout() if source is None else source / "toys"
    if toys is None:
        return
    for file in sorted(toys.rglob("*")):
        parts = file.relative_to(toys).parts
        if file.is_file() and _is_kept(parts):
            yield PurePosixPath(*parts), file.read_bytes()


def _is_kept(parts: tuple[str, ...]) -> bool:
    return len(parts) > 1 and not {"..", *_LEFT} & set(parts)
