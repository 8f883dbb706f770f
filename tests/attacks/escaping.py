"""Attacks that try to get out: into other namespaces, groups, users, the kernel, other processes."""

from tests.attacks.attack import Attack, calls

CONFINED = "a job stays in its sandbox"
KERNEL = "a job reaches no part of the kernel that it has no business with"
LIMITS = "a job stays within its limits"
SIGNALS = "a job can do nothing to other processes"
FILES = "a job writes nothing outside of its directories"
NEWUSER, NEWNS, NEWNET = 0x10000000, 0x20000, 0x40000000

ESCAPING = (
    calls("unshare-user", CONFINED, f"tried(272, {NEWUSER})", bites=True),
    calls("unshare-user-and-mounts", CONFINED, f"tried(272, {NEWUSER | NEWNS})", bites=True),
    Attack(
        "clone-user",
        CONFINED,
        f"got = call(56, {NEWUSER} | 17, 0, 0, 0, 0)\nif got == 0: os._exit(0)\ngot > 0 and through(got)",
        bites=True,
    ),
    Attack(
        "clone3-user",
        CONFINED,
        f"""
args = (ctypes.c_uint64 * 11)({NEWUSER}, 0, 0, 0, 17)
got = call(435, args, 88)
if got == 0: os._exit(0)
got > 0 and through(got)
""",
        bites=True,
    ),
    Attack(
        "mount-by-user-namespace",
        CONFINED,
        f"""
if call(272, {NEWUSER | NEWNS}) == 0:
    libc.mount(b"x", b"/var", b"tmpfs", 0, None) == 0 and through("mounted")
""",
        bites=True,
    ),
    calls(
        "mounts",
        CONFINED,
        "for n in (165, 166, 155, 428, 429, 430, 431, 432, 433, 442): tried(n, 0, 0, 0, 0, 0)",
    ),
    calls("new-root", CONFINED, "tried(161, b'/job/work')"),
    Attack(
        "enter-namespaces",
        CONFINED,
        """
for path in glob.glob("/proc/[0-9]*/ns/*"):
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        continue
    if int(path.split("/")[2]) not in own():
        through(path)
    call(308, fd, 0) == 0 and through("entered", path)
""",
    ),
    calls(
        "file-handles",
        CONFINED,
        "tried(303, -100, b'/usr', ctypes.create_string_buffer(b'\\x80' + bytes(200)), ctypes.byref(ctypes.c_int()), 0)",
        "tried(304, 3, ctypes.create_string_buffer(200), 0)",
        bites=True,
    ),
    calls("keys", KERNEL, "tried(248, b'user', b'x', b'y', 1, -3)", "tried(250, 0, -3, 1)"),
    calls("programs-in-the-kernel", KERNEL, "tried(321, 0, ctypes.create_string_buffer(128), 128)"),
    calls(
        "watch-performance",
        KERNEL,
        "tried(298, ctypes.create_string_buffer(b'\\1\\0\\0\\0\\x80' + bytes(128)), 0, -1, -1, 0)",
    ),
    calls("user-faults", KERNEL, "tried(323, 1)", bites=True),
    calls("io-uring", KERNEL, "tried(425, 4, ctypes.create_string_buffer(256))", bites=True),
    calls("modules", KERNEL, "tried(175, 0, 0, b'')", "tried(313, 0, b'', 0)", "tried(176, b'loop', 0)"),
    calls("other-kernels", KERNEL, "tried(246, 0, 0, 0, 0)", "tried(320, 0, 0, 0, b'', 0)"),
    calls("hardware", KERNEL, "tried(172, 3)", "tried(173, 0x378, 1, 1)"),
    calls(
        "the-machine",
        KERNEL,
        "tried(169, 0xfee1dead, 672274793, 0, 0)",
        "tried(163, b'/job/work/x')",
        "tried(153)",
        "tried(167, b'/dev/vda')",
        "tried(168, b'/dev/vda')",
    ),
    calls(
        "clocks",
        KERNEL,
        "tried(227, 0, (ctypes.c_long * 2)(1, 0))",
        "tried(164, (ctypes.c_long * 2)(1, 0), 0)",
    ),
    calls("names", KERNEL, "tried(170, b'evil', 4)", "tried(171, b'evil', 4)"),
    calls("watch-all-files", KERNEL, "tried(300, 0x200, 0)", bites=True),
    Attack("null-page", KERNEL, "got = libc.personality(0x100000); got >= 0 and through(got)"),
    Attack(
        "calls-of-32-bits",
        KERNEL,
        """
import mmap
code = bytes.fromhex("53b814000000cd805bc3")  # push rbx; mov eax, 20 (getpid); int 0x80; pop rbx; ret
page = mmap.mmap(-1, 4096, prot=7); page.write(code)
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
run() == os.getpid() and through("int 0x80")
""",
    ),
    Attack(
        "type-into-a-terminal",
        CONFINED,
        """
master, slave = os.openpty()
if os.fork() == 0:
    os.setsid(); fcntl.ioctl(slave, 0x540e, 0)
    for char in b"id\\n":
        # The upper half of the register is not looked at by the kernel.
        got = call(16, slave, 0x5412 | 1 << 32, bytes([char]))
        got == 0 and through("typed")
    os._exit(0)
os.wait()
""",
    ),
    Attack(
        "make-devices",
        FILES,
        """
for kind in (stat.S_IFBLK, stat.S_IFCHR):
    try:
        os.mknod("device", kind | 0o666, os.makedev(1, 1)); through(kind)
    except OSError as error:
        print(error)
""",
    ),
    Attack(
        "leave-setuid-files",
        FILES,
        """
open("own", "w").close()
for make in (lambda: os.chmod("own", 0o4755), lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o6755), lambda: os.fchmod(os.open("own", 0), 0o2755)):
    try:
        make()
    except OSError as error:
        print(error)
for name in os.listdir("."):
    os.lstat(name).st_mode & 0o6000 and through(name)
""",
        bites=True,
    ),
    Attack(
        "write-elsewhere",
        FILES,
        """
for place in ("/", "/usr", "/usr/local/bin", "/etc", "/etc/aitbc/miner/allowlist.d", "/var/lib/aitbc", "/var/lib/aitbc/miner/jobs", "/var/tmp", "/run", "/run/lock", "/home", "/root", "/var/spool/cron/crontabs", "/etc/cron.d", "/dev", "/sys/fs/cgroup", "/usr/lib/aitbc-miner"):
    try:
        os.close(os.open(place + "/attack", os.O_CREAT | os.O_WRONLY)); through(place)
    except OSError as error:
        print(place, error.strerror)
""",
        bites=False,
    ),
    Attack(
        "write-settings-of-the-kernel",
        FILES,
        """
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/sys/kernel/mm/ksm/run"):
    try:
        os.close(os.open(path, os.O_WRONLY)); through(path)
    except OSError as error:
        print(path, error.strerror)
""",
    ),
    Attack(
        "leave-its-group",
        LIMITS,
        """
places = glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True) + glob.glob("/sys/fs/cgroup/**/memory.max", recursive=True)
for path in places:
    try:
        os.close(os.open(path, os.O_WRONLY)); through(path)
    except OSError:
        pass
""",
    ),
    Attack(
        "raise-limits",
        LIMITS,
        """
for name in ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_FSIZE"):
    which = getattr(resource, name); soft, hard = resource.getrlimit(which)
    try:
        resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        hard != resource.RLIM_INFINITY and through(name)
    except (OSError, ValueError) as error:
        print(name, error)
""",
    ),
    Attack(
        "come-first",
        LIMITS,
        """
was = os.getpriority(os.PRIO_PROCESS, 0)
for act in (lambda: os.nice(-15), lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)), lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-500")):
    try:
        act(); through("one of them was done")
    except OSError as error:
        print(error)
""",
    ),
    Attack(
        "take-other-cpus",
        LIMITS,
        "try:\n    os.sched_setaffinity(0, {1})\nexcept OSError as error: print(error)\n1 in os.sched_getaffinity(0) and through(os.sched_getaffinity(0))",
    ),
    Attack(
        "signal-others",
        SIGNALS,
        """
mine = own()
for pid in [os.getppid(), *range(1, 3000)]:
    if pid in mine or pid == 0:
        continue
    try:
        os.kill(pid, 0); through(pid)
    except OSError as error:
        pass
""",
    ),
    Attack(
        "trace-others",
        SIGNALS,
        """
for pid in {os.getppid(), 1, *(int(path.split("/")[2]) for path in glob.glob("/proc/[0-9]*/stat"))} - {os.getpid(), 0}:
    call(101, 16, pid, 0, 0) == 0 and through("traced", pid)
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    call(310, pid, vector, 1, vector, 1, 0) >= 0 and through("read", pid)
    fd = call(434, pid, 0)
    fd >= 0 and call(438, fd, 0, 0) >= 0 and through("took a descriptor of", pid)
""",
    ),
    Attack(
        "kill-first-process",
        SIGNALS,
        "os.kill(1, 9)\nos.kill(1, 19)\ntime.sleep(1)\nprint('still here')",
        codes=frozenset({"OK", "E_EXIT"}),
    ),
    Attack(
        "inherited-descriptors",
        CONFINED,
        """
for name in os.listdir("/proc/self/fd"):
    try:
        target = os.readlink("/proc/self/fd/" + name)
    except OSError:
        continue
    if int(name) > 2:
        through(name, target)
for fd in (0, 1, 2):
    # Through a pipe's other end or a file's directory there may be more.
    try:
        os.listdir(f"/proc/self/fd/{fd}/.."); through(fd)
    except OSError:
        pass
""",
    ),
)
