"""Which system calls a job may not make, and why: all others it may.

What is here reaches parts of the kernel that ordinary programs do not need and that have had holes, or
concerns the machine as a whole. Most of it takes rights that a job does not have anyway: the filter stands
for the day when a job finds a way to them.
"""

import errno
import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

from aitbc_miner.errors import MinerError

# <linux/sched.h>: each makes a namespace, in which a process has rights that it has nowhere else.
_NAMESPACES = {
    "CLONE_NEWTIME": 0x80,
    "CLONE_NEWNS": 0x20000,
    "CLONE_NEWCGROUP": 0x2000000,
    "CLONE_NEWUTS": 0x4000000,
    "CLONE_NEWIPC": 0x8000000,
    "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
}
_INT = 0xFFFF_FFFF
"""The kernel takes an int from the lower half of a register, whatever is in the upper one."""
_SETUID = 0o4000
_SETGID = 0o2000
_AF_NETLINK = 16
# All families up to that but AF_UNSPEC, AF_UNIX, AF_INET and AF_INET6.
_OLD_FAMILIES = [family for family in range(3, _AF_NETLINK) if family != 10]  # AF_INET6
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# PERSONALITY 0xffffffff asks which one it is.
_ASKS, _MMAP_PAGE_ZERO = 0x8000_0000, 0x10_0000

NEWER = {
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "fchmodat2": 452,
    "statmount": 457,
    "listmount": 458,
    "open_tree_attr": 467,
}
"""Numbers of calls that Debian 12's libseccomp may not know; from 424 on they are the same everywhere."""


class Denied(NamedTuple):
    """Calls that are not made, what the program is told instead, and why."""

    calls: str
    reason: str
    errno: int = errno.EPERM


class Masked(NamedTuple):
    """A call that is not made if of its argument number `arg` the bits of `mask` are `value`.

    `flag`, if any: and if the bit of that is set in the argument before.
    """

    call: str
    arg: int
    mask: int
    value: int
    reason: str
    errno: int = errno.EPERM
    flag: int = 0


DENIED = (
    Denied("add_key request_key keyctl", "keys outlive the job and are its user's, of all his jobs"),
    Denied("bpf", "programs in the kernel; its checker has had many holes"),
    Denied("perf_event_open", "watches other programs and the kernel; many holes"),
    Denied(
        "userfaultfd", "stops the kernel in the middle of its work, which makes holes usable", errno.ENOSYS
    ),
    Denied(
        "mount umount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount open_tree open_tree_attr "
        "mount_setattr",
        "the sandbox is made of mounts",
    ),
    Denied("statmount listmount", "tells what is mounted elsewhere on the machine", errno.ENOSYS),
    Denied("chroot", "moves the root that paths are beneath of"),
    Denied("setns", "enters the namespaces of others"),
    Denied("clone3", "makes namespaces, and a filter cannot see with which flags", errno.ENOSYS),
    Denied("init_module finit_module delete_module", "changes the kernel itself"),
    Denied("kexec_load kexec_file_load", "replaces the kernel"),
    Denied("ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd", "reaches into other processes"),
    Denied("quotactl quotactl_fd swapon swapoff", "concerns the disks of the machine"),
    Denied("reboot acct vhangup syslog", "concerns the machine as a whole"),
    Denied("sethostname setdomainname", "the names are the miner's to give"),
    Denied("settimeofday clock_settime clock_adjtime adjtimex stime", "sets the machine's clock"),
    Denied("iopl ioperm", "talks to the hardware"),
    Denied("modify_ldt vm86 vm86old", "old ways of x86 that nothing needs and that have had holes"),
    Denied("name_to_handle_at open_by_handle_at", "opens files past the directories they are in"),
    Denied("fanotify_init", "watches all files of a file system"),
    Denied("lookup_dcookie nfsservctl uselib ustat sysfs _sysctl get_kernel_syms query_module", "obsolete"),
    Denied("migrate_pages move_pages", "moves the memory of other processes"),
    Denied(
        "openat2", "makes files with modes that a filter cannot see; C libraries do without", errno.ENOSYS
    ),
)
"""Calls that no job may make, by their names, a blank between two."""

IO_URING = Denied(
    "io_uring_setup io_uring_enter io_uring_register",
    "does what the filter forbids without a call that it sees, and has had very many holes",
    errno.ENOSYS,
)
"""What a job may not use unless its slot says `io_uring: true`."""

_NESTED = "a namespace inside of the sandbox gives rights over parts of the kernel that have had many holes"
_MODES = "a program that takes its owner's rights would be left on the operator's disk"
_TERMINAL = "types into the terminal of whoever started us"
_MODE_ARGUMENTS = {
    "chmod": 1,
    "fchmod": 1,
    "fchmodat": 2,
    "fchmodat2": 2,
    "mknod": 1,
    "mknodat": 2,
    "creat": 1,
}
# Only then is there a mode, right after the flags.
_OPENING = {"open": 2, "openat": 3}
_FAMILY = (
    "a kind of network that ordinary programs do not use; many have had holes, AF_VSOCK leaves a namespace"
)

MASKED = (
    *(Masked("clone", 0, bit, bit, _NESTED) for bit in _NAMESPACES.values() if bit > 0xFF),
    *(Masked("unshare", 0, bit, bit, _NESTED) for bit in _NAMESPACES.values()),
    *(
        Masked(call, arg, bit, bit, _MODES, flag=os.O_CREAT)
        for call, arg in _OPENING.items()
        for bit in (_SETUID, _SETGID)
    ),
    *(Masked("ioctl", 1, _INT, request, _TERMINAL) for request in (_TIOCSTI, _TIOCLINUX)),
    *(
        Masked(call, arg, bit, bit, _MODES)
        for call, arg in _MODE_ARGUMENTS.items()
        for bit in (_SETUID, _SETGID)
    ),
    *(Masked("socket", 0, _INT, family, _FAMILY, errno.EAFNOSUPPORT) for family in _OLD_FAMILIES),
    Masked("personality", 0, _ASKS | _MMAP_PAGE_ZERO, _MMAP_PAGE_ZERO, "makes holes of the kernel usable"),
)
"""Calls that no job may make with these arguments. Besides: sockets of families above AF_NETLINK, and those
of AF_NETLINK but for routes."""


def filter_fd(*, io_uring: bool = False) -> int:
    """Make the filter as bubblewrap takes it: a program for the kernel, in memory, for the caller to close.

    Calls of other architectures (32-bit and x32 programs) end the program.

    Raises:
        MinerError: there is no libseccomp, or it cannot make the filter.
        OSError: no memory or descriptor is left.
    """
    try:
        import pyseccomp  # noqa: PLC0415  # which loads libseccomp, and says why it cannot
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "apt-get install libseccomp2"
        raise MinerError(f"cannot build the system call filter: {error}; {remedy}") from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for denied in (*DENIED, *(() if io_uring else (IO_URING,))):
        for number in numbers(denied.calls.split()):
            rules.add_rule(pyseccomp.ERRNO(denied.errno), number)
    for masked in MASKED:
        compare = [pyseccomp.Arg(masked.arg, pyseccomp.MASKED_EQ, masked.mask, masked.value)]
        if masked.flag:
            compare.append(pyseccomp.Arg(masked.arg - 1, pyseccomp.MASKED_EQ, masked.flag, masked.flag))
        for number in numbers([masked.call]):
            rules.add_rule(pyseccomp.ERRNO(masked.errno), number, *compare)
    for number in numbers(["socket"]):
        above = pyseccomp.Arg(0, pyseccomp.GT, _AF_NETLINK)
        rules.add_rule(pyseccomp.ERRNO(errno.EAFNOSUPPORT), number, above)
        netlink = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _INT, _AF_NETLINK)
        other = pyseccomp.Arg(2, pyseccomp.NE, 0)
        rules.add_rule(pyseccomp.ERRNO(errno.EPROTONOSUPPORT), number, netlink, other)
    fd = os.memfd_create("filter", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        rules.export_bpf(file)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def numbers(calls: list[str]) -> Iterator[int]:
    """Give the numbers of calls on this machine, without those that only others have.

    Raises:
        MinerError: nobody knows a call of this name.
    """
    import pyseccomp  # noqa: PLC0415  # see above

    for call in calls:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)
        if number == -1:
            number = NEWER.get(call, -1)
        if number == -1:
            remedy = f"libseccomp on {platform.machine()} does not know it; apt-get upgrade libseccomp2"
            raise MinerError(f"cannot build the system call filter: no number of {call}; {remedy}")
        # Below that are the numbers that libseccomp makes up for calls of other machines.
        if number >= 0:
            yield number
