"""Files that a user names: regular ones, read whole, and never waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: str | Path, most: int) -> bytes:
    """Read a regular file.

    A pipe or a device would be waited for, some of them for ever, so neither is read.

    Args:
        path: of the file; symbolic links are followed.
        most: bytes that it may have.

    Raises:
        OSError: no such file, one that is not regular, or one that is too large; `strerror` says
            which.
    """
    try:
        # Not to wait for whoever might write into a pipe.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        # No file system has such a name, with a null byte or half a character in it.
        raise OSError(errno.EINVAL, str(error)) from error
    with open(opened, "rb") as file:
        found = os.fstat(opened)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than {most}")
        return file.read()
