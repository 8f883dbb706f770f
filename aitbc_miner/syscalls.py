"""Stand-in."""
import errno, os
import pyseccomp
def filter_fd(*, io_uring: bool = False) -> int:
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "mount")
    fd = os.memfd_create("filter", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        rules.export_bpf(file)
    os.lseek(fd, 0, 0)
    return fd
