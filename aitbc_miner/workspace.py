"""The directories a job finds, and who owns them.

```
input/      the agent's; read-only for the job
work/       the job's; where it starts, with the inputs in it
output/     the job's; all that is left here is delivered
tmp/        the job's TMPDIR
logs/       the worker's; readable by the agent
artifacts/  the worker's; second names of what is delivered, readable by the agent
```
"""

import os
import shutil
import stat

from aitbc_miner.privileges import Identity
from aitbc_miner.records import JobDir
from aitbc_miner.util import fs

OF_JOB = ("work", "output", "tmp")
OF_WORKER = ("logs", "artifacts")


def prepare(job: JobDir, runs_as: Identity | None, service: Identity | None) -> None:
    """Make the directories anew and put the inputs into work/.

    Raises:
        OSError: the disk is full, or something in the job's directory is not what it should be.
    """
    for name in (*OF_JOB, "artifacts"):
        # Of an earlier attempt that came no further than this.
        if fs.exists(job.fd, name):
            shutil.rmtree(name, dir_fd=job.fd)
    for name in OF_JOB:
        _make(job.fd, name, 0o700, runs_as)
    for name in OF_WORKER:
        if not fs.exists(job.fd, name):
            _make(job.fd, name, 0o750, service)
    with fs.directory("input", at=job.fd) as source, fs.directory("work", at=job.fd) as target:
        for name in sorted(os.listdir(source)):  # noqa: PTH208  # a descriptor
            _put(source, name, target)


def _make(at: int, name: str, mode: int, owner: Identity | None) -> None:
    os.mkdir(name, mode, dir_fd=at)
    with fs.directory(name, at=at) as fd:
        os.fchmod(fd, mode)
        if owner:
            os.fchown(fd, owner.uid, owner.gid)


def _put(source: int, name: str, target: int) -> None:
    # A second name costs nothing, however large the input is. What is not a plain file was not fetched by us.
    if stat.S_ISREG(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode):
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
