"""Which system calls a job may not make, and why: all others it may.

What is here reaches parts of the kernel that ordinary programs do not need and that have had holes, or
concerns the machine as a whole. Most of it takes rights that a job does not have anyway: the filter stands
for the day when a job finds a way to them.
"""

import errno
import os
import platform
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from aitbc_miner.errors import MinerError

if TYPE_CHECKING:
    import pyseccomp

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
_O_TMPFILE = 0o2000_0000
"""The bit of it that is not O_DIRECTORY's."""
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
# All families up to the last that is allowed but AF_UNSPEC and those that are.
_OLD_FAMILIES = [family for family in range(3, _AF_NETLINK) if family != _AF_INET6]
# Of internet sockets: SOCK_STREAM and SOCK_DGRAM, with the protocol that follows from it, TCP or UDP.
_KINDS, _PROTOCOLS = {1, 2}, {0, 6, 17}
_KIND = 0xF
"""The bits of a socket's type that are not flags."""
# PERSONALITY 0xffffffff asks which one it is.
_ASKS, _MMAP_PAGE_ZERO = 0x8000_0000, 0x10_0000
_PR_SCHED_CORE, _PR_SET_SECCOMP = 62, 22
# Of seccomp(2), and the same for prctl(2).
_SET_FILTER, _MODE_FILTER = 1, 2

LAST = 462
"""The number of the newest call that these tables have been gone through with: mseal, of Linux 6.10. From 424
on the numbers are the same everywhere."""
_X32 = 0x4000_0000
"""The numbers from here on are those of x32 programs, which the filter ends."""

NEWER = {
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "memfd_secret": 447,
    "process_mrelease": 448,
    "cachestat": 451,
    "fchmodat2": 452,
    "statmount": 457,
    "listmount": 458,
}
"""Numbers of calls that Debian 12's libseccomp may not know."""


class DeniedCall(NamedTuple):
    """Calls that are not made, what the program is told instead, and why."""

    calls: str
    reason: str
    errno: int = errno.EPERM


class Masked(NamedTuple):
    """A call that is not made if of its argument number `arg` the bits of `mask` are `value`.

    `before`, if any: and if of the argument before those of the one are the other, as (mask, value).
    """

    call: str
    arg: int
    mask: int
    value: int
    reason: str
    errno: int = errno.EPERM
    before: tuple[int, int] | None = None


DENIED = (
    DeniedCall("add_key request_key keyctl", "keys outlive the job and are its user's, of all his jobs"),
    DeniedCall("bpf", "programs in the kernel; its checker has had many holes"),
    DeniedCall("perf_event_open", "watches other programs and the kernel; many holes"),
    DeniedCall(
        "userfaultfd", "stops the kernel in the middle of its work, which makes holes usable", errno.ENOSYS
    ),
    DeniedCall(
        "mount umount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr",
        "the sandbox is made of mounts",
    ),
    DeniedCall("statmount listmount", "tells what is mounted elsewhere on the machine", errno.ENOSYS),
    DeniedCall("chroot", "moves the root that paths are beneath of"),
    DeniedCall("setns", "enters the namespaces of others"),
    DeniedCall("clone3", "makes namespaces, and a filter cannot see with which flags", errno.ENOSYS),
    DeniedCall("init_module finit_module delete_module", "changes the kernel itself"),
    DeniedCall("kexec_load kexec_file_load", "replaces the kernel"),
    DeniedCall("ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd", "reaches into other processes"),
    DeniedCall("quotactl quotactl_fd swapon swapoff", "concerns the disks of the machine"),
    DeniedCall("reboot acct vhangup syslog", "concerns the machine as a whole"),
    DeniedCall("sethostname setdomainname", "the names are the miner's to give"),
    DeniedCall("settimeofday clock_settime clock_adjtime adjtimex stime", "sets the machine's clock"),
    DeniedCall("iopl ioperm", "talks to the hardware"),
    DeniedCall("modify_ldt vm86 vm86old", "old ways of x86 that nothing needs and that have had holes"),
    DeniedCall("name_to_handle_at open_by_handle_at", "opens files past the directories they are in"),
    DeniedCall("fanotify_init fanotify_mark", "watches all files of a file system"),
    DeniedCall("cachestat", "tells which files of the machine are in use", errno.ENOSYS),
    DeniedCall("memfd_secret", "keeps the machine from suspending", errno.ENOSYS),
    DeniedCall("process_madvise process_mrelease", "acts upon the memory of other processes", errno.ENOSYS),
    DeniedCall(
        "lookup_dcookie nfsservctl uselib ustat sysfs _sysctl get_kernel_syms query_module", "obsolete"
    ),
    DeniedCall("migrate_pages move_pages", "moves the memory of other processes"),
    DeniedCall(
        "io_setup", "takes of a number that the whole machine has; there are other ways", errno.ENOSYS
    ),
    DeniedCall(
        "openat2", "makes files with modes that a filter cannot see; C libraries do without", errno.ENOSYS
    ),
)
"""Calls that no job may make, by their names, a blank between two."""

IO_URING = DeniedCall(
    "io_uring_setup io_uring_enter io_uring_register",
    "does what the filter forbids without a call that it sees, and has had very many holes",
    errno.ENOSYS,
)
"""What a job may not use unless its slot says `io_uring: true`."""

_NESTED = "a namespace inside of the sandbox gives rights over parts of the kernel that have had many holes"
_MODES = "a program that takes its owner's rights would be left on the operator's disk"
# Not of mkdir(2): the kernel drops the bits there, and programs ask for a setgid directory so.
_MODE_ARGUMENTS = {
    "chmod": 1,
    "fchmod": 1,
    "fchmodat": 2,
    "fchmodat2": 2,
    "mknod": 1,
    "mknodat": 2,
    "creat": 1,
}
# Only with one of these flags is there a mode, right after them.
_OPENING = {"open": 2, "openat": 3}
_MAKING = (os.O_CREAT, _O_TMPFILE)
_FAMILY = (
    "a kind of network that ordinary programs do not use; many have had holes, AF_VSOCK leaves a namespace"
)
_REQUESTS = {
    # TIOCSTI, TIOCLINUX
    "types into the terminal of whoever started us": (0x5412, 0x541C),
    # TIOCSETD, TIOCCONS
    "loads drivers of lines that have had many holes, or takes the console": (0x5423, 0x541D),
    # SIOCGIFBR, SIOCSIFBR, SIOCGIFVLAN, SIOCSIFVLAN, SIOCBRADDBR, SIOCBRDELBR: before any right is asked for
    "loads drivers of networks": (0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1),
    # FS_IOC_SET_ENCRYPTION_POLICY, FS_IOC_ADD_ENCRYPTION_KEY
    "keys of file systems outlive the job": (0x800C_6613, 0xC050_6617),
    # BTRFS_IOC_SNAP_CREATE, _SUBVOL_CREATE, _SNAP_CREATE_V2, _SUBVOL_CREATE_V2, _SUBVOL_SETFLAGS
    "makes file systems on the operator's disk that cannot be removed": (
        *(0x5000_9401, 0x5000_940E, 0x5000_9417, 0x5000_9418, 0x4008_941A),
    ),
}
# MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB: argument and bit
_HUGE = {"mmap": (3, 0x4_0000), "memfd_create": (1, 4), "shmget": (2, 0o4000)}
_POOL = "the machine's large pages, which no limit of a slot counts"
_OWN_FILTERS = "the kernel's room for translated filters is the whole machine's, other slots' included"
_OPTIONS = {
    # SOL_SOCKET: SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _REUSEPORT_EBPF
    "programs in the kernel, as of `bpf`": [(1, option) for option in (26, 50, 51, 52)],
    # TCP: TCP_ULP; UDP: UDP_ENCAP
    "other protocols on a socket that has been made": [(6, 31), (17, 100)],
}

MASKED = (
    *(Masked("clone", 0, bit, bit, _NESTED) for bit in _NAMESPACES.values() if bit > 0xFF),
    *(Masked("unshare", 0, bit, bit, _NESTED) for bit in _NAMESPACES.values()),
    *(
        Masked(call, arg, bit, bit, _MODES, before=(flag, flag))
        for call, arg in _OPENING.items()
        for bit in (_SETUID, _SETGID)
        for flag in _MAKING
    ),
    *(
        Masked(call, arg, bit, bit, _MODES)
        for call, arg in _MODE_ARGUMENTS.items()
        for bit in (_SETUID, _SETGID)
    ),
    *(
        Masked("ioctl", 1, _INT, request, reason)
        for reason, requests in _REQUESTS.items()
        for request in requests
    ),
    *(Masked("socket", 0, _INT, family, _FAMILY, errno.EAFNOSUPPORT) for family in _OLD_FAMILIES),
    *(
        Masked("socket", 1, _KIND, kind, _FAMILY, errno.ESOCKTNOSUPPORT, before=(_INT, family))
        for family in (_AF_INET, _AF_INET6)
        for kind in range(_KIND + 1)
        if kind not in _KINDS
    ),
    *(
        Masked("setsockopt", 2, _INT, option, reason, errno.ENOPROTOOPT, before=(_INT, level))
        for reason, options in _OPTIONS.items()
        for level, option in options
    ),
    *(Masked(call, arg, bit, bit, _POOL, errno.ENOMEM) for call, (arg, bit) in _HUGE.items()),
    # Told as by a kernel without such filters: programs then do without.
    Masked("seccomp", 0, _INT, _SET_FILTER, _OWN_FILTERS, errno.EINVAL),
    Masked("prctl", 1, _INT, _MODE_FILTER, _OWN_FILTERS, errno.EINVAL, before=(_INT, _PR_SET_SECCOMP)),
    Masked("personality", 0, _ASKS | _MMAP_PAGE_ZERO, _MMAP_PAGE_ZERO, "makes holes of the kernel usable"),
    Masked("prctl", 0, _INT, _PR_SCHED_CORE, "keeps others from the rest of a processor's core"),
)
"""Calls that no job may make with these arguments. Besides: sockets of families above AF_NETLINK, those of
AF_NETLINK but for routes, those of the internet but for TCP and UDP, and pairs of sockets but AF_UNIX."""


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
        if masked.before is not None:
            compare.append(pyseccomp.Arg(masked.arg - 1, pyseccomp.MASKED_EQ, *masked.before))
        for number in numbers([masked.call]):
            rules.add_rule(pyseccomp.ERRNO(masked.errno), number, *compare)
    _refuse_sockets(rules)
    fd = os.memfd_create("filter", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(_REFUSE_NEWER)
        file.flush()
        rules.export_bpf(file)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


# The filter's first steps: a call that is newer than `LAST` is told to be none. libseccomp knows no ranges.
# Each is struct sock_filter: code, steps to go on when true, when false, and a number; see <linux/filter.h>.
_LOAD, _GREATER, _NOT_LESS, _RETURN, _SECCOMP_ERRNO = 0x20, 0x25, 0x35, 0x06, 0x5_0000
_REFUSE_NEWER = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (_LOAD, 0, 0, 0),  # the number
        (_GREATER, 0, 2, LAST),
        (_NOT_LESS, 1, 0, _X32),
        (_RETURN, 0, 0, _SECCOMP_ERRNO | errno.ENOSYS),
    )
)


def _refuse_sockets(rules: "pyseccomp.SyscallFilter") -> None:
    """Refuse all that the tables do not name, so that what the kernel learns later is refused, too.

    The numbers are compared whole: one with an upper half is refused, though the kernel would not see it.
    """
    import pyseccomp  # noqa: PLC0415  # see filter_fd

    family, _, protocol = range(3)
    (number,), (pair,) = numbers(["socket"]), numbers(["socketpair"])
    told = pyseccomp.ERRNO(errno.EAFNOSUPPORT)
    rules.add_rule(told, number, pyseccomp.Arg(family, pyseccomp.GT, _AF_NETLINK))
    rules.add_rule(told, pair, pyseccomp.Arg(family, pyseccomp.NE, _AF_UNIX))
    told = pyseccomp.ERRNO(errno.EPROTONOSUPPORT)
    netlink = pyseccomp.Arg(family, pyseccomp.MASKED_EQ, _INT, _AF_NETLINK)
    rules.add_rule(told, number, netlink, pyseccomp.Arg(protocol, pyseccomp.NE, 0))
    for each in (_AF_INET, _AF_INET6):
        internet = pyseccomp.Arg(family, pyseccomp.MASKED_EQ, _INT, each)
        rules.add_rule(told, number, internet, pyseccomp.Arg(protocol, pyseccomp.GT, max(_PROTOCOLS)))
        for other in set(range(max(_PROTOCOLS))) - _PROTOCOLS:
            rules.add_rule(told, number, internet, pyseccomp.Arg(protocol, pyseccomp.EQ, other))


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
