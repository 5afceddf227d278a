"""Open regular files only, and explain errors of the operating system.

A FIFO, a socket or a device in place of a file would block a reader forever, or never end.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, errno.EINVAL, "is a pipe (FIFO), not a regular file"),
    (stat.S_ISSOCK, errno.EINVAL, "is a socket, not a regular file"),
    (stat.S_ISCHR, errno.EINVAL, "is a device, not a regular file"),
    (stat.S_ISBLK, errno.EINVAL, "is a device, not a regular file"),
)

_REMEDIES = {
    errno.ENOSPC: "free disk space, or write to another disk",
    errno.EDQUOT: "your quota on this file system is used up; free space, or write to another disk",
    errno.EROFS: "write to another file system",
    errno.EACCES: "correct its permissions, or use another path",
    errno.EPERM: "correct its permissions, or use another path",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EMFILE: "raise the limit of open files with `ulimit -n 4096`",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.ELOOP: "the link leads to itself; remove it",
    errno.EISDIR: "a folder has its name; remove or rename that",
    errno.ENOTDIR: "a file stands where one of its folders should be; remove or rename that",
    errno.EEXIST: "a file stands where one of its folders should be; remove or rename that",
    errno.EIO: "the disk or the network file system has a fault; check it",
    errno.ESTALE: "the network file system lost the file; mount it again",
}


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; links are followed.

    Raises:
        OSError: it cannot be opened, no file can have this name, or it is a FIFO, a socket, a device or a folder;
            `strerror` names which.
    """
    # Without O_NONBLOCK, opening a FIFO waits for its writer; regular files ignore the flag.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError:  # a zero byte, or a character that the file system's encoding does not have
        raise OSError(errno.EINVAL, "no file can have this name", os.fspath(path)) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            require_regular(os.stat(path).st_mode, path)
        raise
    try:
        require_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(mode: int, path: str | os.PathLike[str]) -> None:
    """Check the mode that `stat` returns for a path.

    Raises:
        OSError: it is not that of a regular file; `strerror` names the kind.
    """
    for applies, number, reason in _KINDS:
        if applies(mode):
            raise OSError(number, reason, os.fspath(path))


def read_bytes(path: str | os.PathLike[str], *, limit: int | None = None) -> bytes:
    """Read a whole regular file.

    Args:
        path: the file.
        limit: the largest size in bytes; None: any.

    Raises:
        OSError: as in `open_regular`; or the file is larger than the limit.
    """
    with open_regular(path) as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes", os.fspath(path))
    return data


def os_error_text(error: OSError, path: str | Path | None = None) -> str:
    """One line for an error of the operating system: the path, the reason and a remedy.

    Args:
        error: what was raised.
        path: the file at fault; None: the one that the error names, if any.
    """
    named = path if path is not None else error.filename
    where = f"{os.fsdecode(named)}: " if isinstance(named, str | bytes | os.PathLike) else ""
    return where + os_error_reason(error)


def os_error_reason(error: OSError) -> str:
    """The reason of an error of the operating system and a remedy, without the path."""
    return f"{error.strerror or error}{os_error_remedy(error)}"


def os_error_remedy(error: BaseException | None) -> str:
    """What to do about an error of the operating system, after a semicolon; empty where that is unknown."""
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"; {remedy}" if remedy else ""
