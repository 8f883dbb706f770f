"""The tables of system calls that a job may not make, with reasons. All other calls are allowed.

A forbidden call reaches a part of the kernel that ordinary programs do not need and that has had holes, or
changes the machine as a whole. Most forbidden calls need rights that a job lacks anyway. The filter protects
the machine on the day when a job gains these rights.
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

# <linux/sched.h>: each flag makes a namespace. In a new namespace a process gains rights.
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
"""The kernel reads an int from the lower half of a register, and ignores the upper half."""
_SETUID = 0o4000
_SETGID = 0o2000
_O_TMPFILE = 0o2000_0000
"""O_TMPFILE without its bit O_DIRECTORY."""
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
# The forbidden families below AF_NETLINK, the highest allowed family.
_OLD_FAMILIES = [family for family in range(3, _AF_NETLINK) if family != _AF_INET6]
# The allowed internet sockets: SOCK_STREAM and SOCK_DGRAM, with the default protocol, TCP or UDP.
_KINDS, _PROTOCOLS = {1, 2}, {0, 6, 17}
_KIND = 0xF
"""The bits of a socket's type without its flags."""
# personality(0xffffffff) only asks for the current personality.
_ASKS, _MMAP_PAGE_ZERO = 0x8000_0000, 0x10_0000
_PR_SCHED_CORE, _PR_SET_SECCOMP = 62, 22
# Arguments of seccomp(2) and prctl(2) that install a filter.
_SET_FILTER, _MODE_FILTER = 1, 2

LAST = 462
"""The number of the newest call that the tables consider: mseal, of Linux 6.10. From 424 on, the numbers are
the same on all architectures."""
_X32 = 0x4000_0000
"""The first number of x32 programs; the filter kills these programs."""

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
    """Forbidden calls (names with blanks between), the reason, and the error that the program gets."""

    calls: str
    reason: str
    errno: int = errno.EPERM


class Masked(NamedTuple):
    """A call that is forbidden if argument number `arg` has `value` in the bits of `mask`.

    `before` is a further condition: the mask and value of the argument before `arg`.
    """

    call: str
    arg: int
    mask: int
    value: int
    reason: str
    errno: int = errno.EPERM
    before: tuple[int, int] | None = None


DENIED = (
    DeniedCall("add_key request_key keyctl", "keys outlive the job, and all jobs of the user share them"),
    DeniedCall("bpf", "programs in the kernel; its checker has had many holes"),
    DeniedCall("perf_event_open", "watches other programs and the kernel; many holes"),
    DeniedCall("userfaultfd", "stops the kernel halfway, so that holes become usable", errno.ENOSYS),
    DeniedCall(
        "mount umount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr",
        "the sandbox is made of mounts",
    ),
    DeniedCall("statmount listmount", "tells the mounts of other programs", errno.ENOSYS),
    DeniedCall("chroot", "moves the root directory"),
    DeniedCall("setns", "enters the namespaces of other processes"),
    DeniedCall("clone3", "makes namespaces, and a filter cannot see the flags", errno.ENOSYS),
    DeniedCall("init_module finit_module delete_module", "changes the kernel itself"),
    DeniedCall("kexec_load kexec_file_load", "replaces the kernel"),
    DeniedCall("ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd", "reaches into other processes"),
    DeniedCall("quotactl quotactl_fd swapon swapoff", "concerns the disks of the machine"),
    DeniedCall("reboot acct vhangup syslog", "concerns the machine as a whole"),
    DeniedCall("sethostname setdomainname", "the miner gives the names"),
    DeniedCall("settimeofday clock_settime clock_adjtime adjtimex stime", "sets the machine's clock"),
    DeniedCall("iopl ioperm", "talks to the hardware"),
    DeniedCall("modify_ldt vm86 vm86old", "old interfaces of x86; no program needs them, and some had holes"),
    DeniedCall("name_to_handle_at open_by_handle_at", "opens files past the rights of their directories"),
    DeniedCall("fanotify_init fanotify_mark", "watches all files of a file system"),
    DeniedCall("cachestat", "tells the machine's files in use", errno.ENOSYS),
    DeniedCall("memfd_secret", "keeps the machine from suspending", errno.ENOSYS),
    DeniedCall("process_madvise process_mrelease", "acts upon the memory of other processes", errno.ENOSYS),
    DeniedCall(
        "lookup_dcookie nfsservctl uselib ustat sysfs _sysctl get_kernel_syms query_module", "obsolete"
    ),
    DeniedCall("migrate_pages move_pages", "moves the memory of other processes"),
    DeniedCall("io_setup", "takes from a pool of the whole machine; programs have other ways", errno.ENOSYS),
    DeniedCall(
        "openat2", "makes files with modes hidden from a filter; C libraries do without", errno.ENOSYS
    ),
)
"""Calls that no job may make."""

IO_URING = DeniedCall(
    "io_uring_setup io_uring_enter io_uring_register",
    "makes forbidden calls past the filter, and has had very many holes",
    errno.ENOSYS,
)
"""Calls that a job may make only if its slot has `io_uring: true`."""

_NESTED = "a namespace inside the sandbox gives rights over parts of the kernel with many past holes"
_MODES = "would leave a program with its owner's rights on the operator's disk"
# Without mkdir(2): the kernel drops the bits, and programs do ask for a setgid directory.
_MODE_ARGUMENTS = {
    "chmod": 1,
    "fchmod": 1,
    "fchmodat": 2,
    "fchmodat2": 2,
    "mknod": 1,
    "mknodat": 2,
    "creat": 1,
}
# open(2) has a mode, right after the flags, only with a flag of _MAKING.
_OPENING = {"open": 2, "openat": 3}
_MAKING = (os.O_CREAT, _O_TMPFILE)
_FAMILY = "a network that ordinary programs do not use; many had holes, and AF_VSOCK leaves a namespace"
_REQUESTS = {
    # TIOCSTI, TIOCLINUX
    "types into the terminal of the person who started the miner": (0x5412, 0x541C),
    # TIOCSETD, TIOCCONS
    "loads line disciplines, many with past holes, or takes the console": (0x5423, 0x541D),
    # SIOCGIFBR, SIOCSIFBR, SIOCGIFVLAN, SIOCSIFVLAN, SIOCBRADDBR, SIOCBRDELBR: load before the rights are
    # checked
    "loads drivers of networks": (0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1),
    # FS_IOC_SET_ENCRYPTION_POLICY, FS_IOC_ADD_ENCRYPTION_KEY
    "keys of file systems outlive the job": (0x800C_6613, 0xC050_6617),
    # BTRFS_IOC_SNAP_CREATE, _SUBVOL_CREATE, _SNAP_CREATE_V2, _SUBVOL_CREATE_V2, _SUBVOL_SETFLAGS
    "makes unremovable file systems": (0x5000_9401, 0x5000_940E, 0x5000_9417, 0x5000_9418, 0x4008_941A),
}
# MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB: argument and bit
_HUGE = {"mmap": (3, 0x4_0000), "memfd_create": (1, 4), "shmget": (2, 0o4000)}
_POOL = "takes the machine's large pages; no limit of a slot counts them"
_OWN_FILTERS = "takes the kernel's room for translated filters; all slots share the room"
_OPTIONS = {
    # SOL_SOCKET: SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _REUSEPORT_EBPF
    "programs in the kernel, as of `bpf`": [(1, option) for option in (26, 50, 51, 52)],
    # TCP: TCP_ULP; UDP: UDP_ENCAP
    "other protocols on an existing socket": [(6, 31), (17, 100)],
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
    # The error of a kernel without filters, so that programs do without.
    Masked("seccomp", 0, _INT, _SET_FILTER, _OWN_FILTERS, errno.EINVAL),
    Masked("prctl", 1, _INT, _MODE_FILTER, _OWN_FILTERS, errno.EINVAL, before=(_INT, _PR_SET_SECCOMP)),
    Masked("personality", 0, _ASKS | _MMAP_PAGE_ZERO, _MMAP_PAGE_ZERO, "makes holes of the kernel usable"),
    Masked("prctl", 0, _INT, _PR_SCHED_CORE, "keeps other programs from the rest of a processor's core"),
)
"""Calls that no job may make with the given arguments. `_refuse_sockets` adds sockets of families above
AF_NETLINK, of AF_NETLINK except routes, of the internet except TCP and UDP, and pairs except AF_UNIX."""


def filter_fd(*, io_uring: bool = False) -> int:
    """Write the filter, in the format of bubblewrap, into a file in memory; the caller closes the descriptor.

    A call of another architecture (32-bit or x32 program) kills the program.

    Raises:
        MinerError: libseccomp is missing, or cannot make the filter.
        OSError: no memory or descriptor is left.
    """
    try:
        import pyseccomp  # noqa: PLC0415  # the import loads libseccomp, and its error names the cause
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


# The first steps of the filter: a call newer than `LAST` gets ENOSYS. libseccomp cannot compare with ranges.
# Each step is a struct sock_filter of <linux/filter.h>: code, steps to skip if true, steps to skip if false,
# number.
_LOAD, _GREATER, _NOT_LESS, _RETURN, _SECCOMP_ERRNO = 0x20, 0x25, 0x35, 0x06, 0x5_0000
_REFUSE_NEWER = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (_LOAD, 0, 0, 0),  # the number of the call
        (_GREATER, 0, 2, LAST),
        (_NOT_LESS, 1, 0, _X32),
        (_RETURN, 0, 0, _SECCOMP_ERRNO | errno.ENOSYS),
    )
)


def _refuse_sockets(rules: "pyseccomp.SyscallFilter") -> None:
    """Refuse all sockets but those of the tables, and so the sockets of later kernels, too.

    The comparison uses whole registers: a number with an upper half is refused, though the kernel ignores it.
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
    """Give the numbers of calls on this machine; calls that only other machines have are left out.

    Raises:
        MinerError: neither libseccomp nor `NEWER` knows the call.
    """
    import pyseccomp  # noqa: PLC0415  # see above

    for call in calls:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)
        if number == -1:
            number = NEWER.get(call, -1)
        if number == -1:
            cause = f"libseccomp on {platform.machine()} has no number of {call}"
            raise MinerError(f"cannot build the system call filter: {cause}; apt-get upgrade libseccomp2")
        # libseccomp invents negative numbers for calls of other machines.
        if number >= 0:
            yield number
