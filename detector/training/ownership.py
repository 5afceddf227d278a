"""One owner at a time for a run folder: two trainings in one folder would leave a mixture of both."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from detector import distributed
from detector.atomic import make_folder
from detector.errors import RunError
from detector.files import os_error_text
from detector.text import printable

LOCK_NAME = ".owner.lock"

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_owned: set[str] = set()
"""Folders of this process: a lock of the operating system does not exclude another thread."""


def owned_by_first_process(folder: Path) -> contextlib.AbstractContextManager[str | None]:
    """`own_folder`, of the processes that train together on the first one only."""
    return own_folder(folder) if distributed.rank() == 0 else contextlib.nullcontext()


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[str | None]:
    """Own a run folder, which is created, until the end of the block or of this process.

    The lock is a POSIX record lock on `LOCK_NAME`: the kernel releases it when the process ends in any way, and loader
    workers do not inherit it. It also excludes other machines on NFS 4, and on NFS 3 with a lock daemon; where the file
    system has no locks, the owner is only recorded in the file.

    Args:
        folder: of the run.

    Yields:
        A warning if the file system has no locks; else None.

    Raises:
        RunError: another process owns the folder, or it cannot be written to; the message names both.
    """
    existed = folder.exists()
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:  # TensorBoard cannot write to it
        raise RunError(f"--output-dir must be a name in UTF-8, got {printable(str(folder))}; choose another") from None
    make_folder(folder)
    path, real = folder / LOCK_NAME, os.path.realpath(folder)
    if real in _owned:
        raise RunError(f"another run of this process is active in {folder}; choose another --output-dir")
    descriptor, warning = _lock(path, folder)
    _owned.add(real)
    try:
        yield warning
    finally:
        _owned.discard(real)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # before the lock is released: afterwards it may be another owner's
            if not existed:
                folder.rmdir()  # fails where the run has written anything
        os.close(descriptor)


def _lock(path: Path, folder: Path) -> tuple[int, str | None]:
    """Lock a file; returns its descriptor and a warning where locks are not supported."""
    warning = None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(f"--output-dir must be a folder to write in, got {os_error_text(error, folder)}") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last owner may have deleted the file between opening and locking it.
            current = os.stat(path)
            if not os.path.samestat(current, os.fstat(descriptor)):
                os.close(descriptor)
                continue
        except FileNotFoundError:
            os.close(descriptor)
            continue
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                warning = f"the file system of {folder} has no locks ({error.strerror}): start only one run in it"
            else:
                owner = _describe_owner(descriptor)
                os.close(descriptor)
                raise RunError(
                    f"another run is active in {folder}{owner}; wait for it or stop it, or choose another --output-dir"
                ) from None
        content = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk does not matter here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(content).encode(), 0)
        return descriptor, warning


def _describe_owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f": process {owner['process']:d} on {owner['host']:.60}, since {owner['since']:.20}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
