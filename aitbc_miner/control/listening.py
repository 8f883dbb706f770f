"""A local socket to listen on: made, recognised, and never taken from somebody who listens there."""

import os
import socket
import stat
from pathlib import Path


def listen(path: Path, readers: set[int]) -> socket.socket:
    """Listen on a socket that root and the readers' group can reach.

    Raises:
        OSError: the path is too long or taken, or its directory cannot be written.
    """
    made = _make_directory(path.parent)
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody may connect in the moment before the mode is set.
    old = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old)
    if os.geteuid() == 0 and readers:
        # A directory that was there already belongs to somebody who knows whom it is for.
        for place in (path.parent, path) if made else (path,):
            os.chown(place, -1, next(iter(readers)))
        path.chmod(0o660)
    # A client with a time-out does not wait for room in the queue: it is turned away.
    listener.listen(socket.SOMAXCONN)
    os.set_blocking(listener.fileno(), False)  # takes no keyword
    return listener


def identity(path: Path) -> tuple[int, int] | None:
    """Name what is at a path; None when there is nothing."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_directory(path: Path) -> bool:
    """Make the socket's directory; False when it is there already, and not as we make it."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.mkdir(mode=0o750, exist_ok=True)
    found = path.stat()
    return (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o750)


def _clear(path: Path) -> None:
    """Remove a socket that a miner left behind when it was killed.

    Raises:
        OSError: it is no socket, or somebody listens there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(
            f"cannot listen on {path}: it is no socket; remove it, or set another control.socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A listener whose queue is full lets nobody wait either, but is one.
        probe.setblocking(False)  # noqa: FBT003  # takes no keyword
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise OSError(
        f"cannot listen on {path}: another miner answers there; stop that one, or set another control.socket"
    )
