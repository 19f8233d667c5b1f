"""Reading files that may be anything, and replacing files without ever leaving half of one."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

StrPath = str | os.PathLike[str]


def read_bounded(path: StrPath, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        ValueError: the file is of another kind or larger than ``max_bytes``; one line.
        OSError: it cannot be read.
    """
    # Opening a FIFO would wait for a writer without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise ValueError("is a directory")
        if not stat.S_ISREG(kind):
            raise ValueError("is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise ValueError(f"is larger than {max_bytes} bytes")
    return content


def write_atomically(path: StrPath, content: bytes) -> None:
    """Writes a temporary file beside ``path``, flushes it to the disk and renames it.

    A reader sees the old file or the new one, never a part.

    Raises:
        OSError: the file cannot be written; whatever was there stays.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
