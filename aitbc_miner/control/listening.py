"""Makes a local socket to listen on, and never takes the socket of a program that listens already."""

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
    # Keeps everybody out until the mode is set.
    old = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old)
    if os.geteuid() == 0 and readers:
        # If the directory existed already, its owner has chosen its group.
        for place in (path.parent, path) if made else (path,):
            os.chown(place, -1, next(iter(readers)))
        path.chmod(0o660)
    # A full queue turns a client with a time-out away at once, so the queue is as long as possible.
    listener.listen(socket.SOMAXCONN)
    os.set_blocking(listener.fileno(), False)
    return listener


def identity(path: Path) -> tuple[int, int] | None:
    """Give device and inode of a path; None if the path does not exist."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_directory(path: Path) -> bool:
    """Make the socket's directory; False if it exists with another owner, group or mode than ours."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.mkdir(mode=0o750, exist_ok=True)
    found = path.stat()
    return (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o750)


def _clear(path: Path) -> None:
    """Remove the socket of a killed miner.

    Raises:
        OSError: the path is no socket, or a program listens there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(
            f"cannot listen on {path}: the file is no socket; remove the file, or set another control.socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A listener with a full queue raises BlockingIOError.
        probe.setblocking(False)  # noqa: FBT003  # takes no keyword
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise OSError(
        f"cannot listen on {path}: another miner listens there; stop it, or set another control.socket"
    )
