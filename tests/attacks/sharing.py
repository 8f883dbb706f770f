"""Attacks by the other entrance: the sibling of a call, file, socket or device that is refused or bounded."""

from tests.attacks.attack import Attack, calls
from tests.attacks.escaping import CONFINED, FILES, KERNEL
from tests.attacks.reading import MACHINE
from tests.attacks.starving import LIMITED, SHARE

# Makes a file with each of these modes by one more call, and looks what was left.
LEAVE = """
def leave(make):
    for mode in (0o4755, 0o2755, 0o6777):
        try:
            made = make(mode)
            made is not None and made < 0 and print(errno.errorcode.get(-made, made))
        except OSError as error:
            print(error)
    for name in os.listdir("."):
        os.lstat(name).st_mode & 0o6000 and through(name)
"""


def leaves(name: str, make: str, *, bites: bool = True) -> Attack:
    """Make an attack that leaves a setuid or setgid file by a certain call."""
    return Attack(name, FILES, f"{LEAVE}\nleave(lambda mode: {make})", bites)


def takes(name: str, make: str, most: int, enough: int, *, bites: bool = False) -> Attack:
    """Make an attack that takes a thing which all jobs share again and again, up to `enough`."""
    program = f"""
def got(number):
    if number < 0: raise OSError(ctypes.get_errno(), "refused")
    return number
made = []
try:
    while len(made) < {enough}: made.append({make})
except OSError as error:
    print(error)
print(len(made)); len(made) > {most} and through(len(made))
"""
    return Attack(name, SHARE, program, bites, LIMITED)


SHARING = (
    leaves(
        "leave-setgid-file-without-name",
        "os.link(f'/proc/self/fd/{os.open(\".\", os.O_TMPFILE | os.O_WRONLY, mode)}', f't{mode}', dst_dir_fd=os.open('.', 0))",
    ),
    leaves("leave-setuid-file-by-creat", "call(85, f'c{mode}'.encode(), mode)"),
    leaves("leave-setuid-file-by-mknod", "os.mknod(f'n{mode}', stat.S_IFREG | mode)"),
    leaves(
        "leave-setuid-file-by-openat2",
        "call(437, -100, f'o{mode}'.encode(), struct.pack('=QQQ', os.O_CREAT | os.O_WRONLY, mode, 0), 24)",
    ),
    leaves(
        "leave-setuid-file-by-fchmodat2",
        "(open('own', 'w').close(), call(452, -100, b'own', mode, 0))[1]",
        bites=False,
    ),
    Attack(
        "watch-pressure",
        FILES,
        """
held = []
for name in ("cpu", "io", "memory"):
    try:
        for _ in range(200):
            held.append(os.open(f"/proc/pressure/{name}", os.O_RDWR | os.O_NONBLOCK))
            os.write(held[-1], b"some 500000 2000000")
            through(name, len(held))
    except OSError as error:
        print(name, error)
""",
    ),
    Attack(
        "write-all-there-is",
        FILES,
        """
nodes = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx")}
for top in ("/proc", "/sys", "/dev", "/etc", "/run", "/var", "/opt", "/srv", "/boot"):
    for place, names, files in os.walk(top):
        if place == "/proc":
            names[:] = [name for name in names if not name.isdigit() and name not in ("self", "thread-self")]
        if place == "/dev":
            names[:] = [name for name in names if name not in ("shm", "pts")]
        for name in files:
            path = os.path.join(place, name)
            if path in nodes or os.path.islink(path):
                continue
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)); through(path)
            except OSError:
                pass
        try:
            os.close(os.open(os.path.join(place, "attack"), os.O_CREAT | os.O_WRONLY)); through(place)
        except OSError:
            pass
""",
    ),
    Attack(
        "hold-locks-of-the-machine",
        SHARE,
        """
for path in ("/run", "/run/lock", "/var/lib/aitbc", "/var/lib/aitbc/miner", "/run/aitbc-miner", "/var/lib/dpkg/lock", "/var/lib/dpkg", "/etc/.pwd.lock", "/etc"):
    try:
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        path != "/etc" and through(path)
    except OSError as error:
        print(path, error)
""",
        bites=True,
    ),
    Attack(
        "learn-devices",
        MACHINE,
        """
for path in ("/sys/bus", "/sys/class", "/sys/block", "/sys/devices/pci0000:00", "/proc/bus/pci", "/proc/driver", "/proc/scsi", "/proc/fs/ext4", "/proc/irq"):
    try:
        os.listdir(path) and through(path)
    except OSError as error:
        print(path, error)
for path in ("/proc/interrupts", "/proc/iomem", "/proc/keys"):
    read(path) and through(path)
""",
        bites=True,
    ),
    Attack(
        "pairs-of-odd-sockets",
        KERNEL,
        """
pair = (ctypes.c_int * 2)()
for family in (30, 2, 16, 17, 38, 45):
    got = call(53, family, 1, 0, pair)
    got != -errno.EAFNOSUPPORT and through(family, errno.errorcode.get(-got, got))
""",
        bites=True,
    ),
    Attack(
        "odd-protocols",
        KERNEL,
        """
for family in (2, 10):
    for kind, protocol in ((1, 132), (5, 132), (5, 0), (1, 262), (2, 136), (2, 115), (2, 1), (2, 58), (6, 33), (3, 255), (4, 0)):
        try:
            socket.socket(family, kind, protocol); through(family, kind, protocol)
        except OSError as error:
            print(family, kind, protocol, error)
""",
        bites=True,
    ),
    Attack(
        "programs-on-sockets",
        KERNEL,
        """
# BPF_RET | BPF_K, everything
code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0xffffffff))
line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for option in (26, 51):
    try:
        line.setsockopt(1, option, struct.pack("HxxxxxxP", 1, ctypes.addressof(code))); through(option)
    except OSError as error:
        print(option, error)
""",
        bites=True,
    ),
    Attack(
        "protocols-on-sockets",
        KERNEL,
        """
server = socket.create_server(("127.0.0.1", 0))
line = socket.create_connection(server.getsockname())
for name in (b"tls", b"smc", b"espintcp", b"mptcp"):
    try:
        line.setsockopt(6, 31, name); through(name)
    except OSError as error:
        print(name, error); error.errno != errno.ENOPROTOOPT and through("looked for", name)
""",
        bites=True,
    ),
    Attack(
        "line-disciplines",
        KERNEL,
        """
ours, theirs = os.openpty()
for number in (0, 2, 3, 13, 21):
    try:
        fcntl.ioctl(theirs, 0x5423, struct.pack("i", number)); through(number)
    except OSError as error:
        print(number, error)
""",
        bites=True,
    ),
    Attack(
        "requests-to-file-systems",
        KERNEL,
        """
here = os.open(".", os.O_RDONLY)
# Keys of fscrypt, then subvolumes of btrfs: a file system that has none of them says so, if it is asked.
for request in (0xC0506617, 0x800C6613, 0x5000940E, 0x50009401, 0x50009418, 0x4008941A):
    got = call(16, here, request, ctypes.create_string_buffer(4096))
    got != -errno.EPERM and through(hex(request), errno.errorcode.get(-got, got))
""",
        bites=True,
    ),
    Attack(
        "calls-of-later-kernels",
        KERNEL,
        """
for number in range(463, 560):
    got = call(number, 0, 0, 0, 0, 0, 0)
    got != -errno.ENOSYS and through(number, got)
""",
    ),
    calls("memory-of-others", KERNEL, "tried(440, -1, 0, 0, 0, 0)", "tried(448, -1, 0)", bites=True),
    calls("memory-that-is-secret", KERNEL, "tried(447, 0)"),
    calls(
        "files-in-use",
        MACHINE,
        "tried(451, os.open('/usr/bin/python3', 0), (ctypes.c_uint64 * 2)(0, 1 << 20), (ctypes.c_uint64 * 5)(), 0)",
    ),
    Attack("cores-for-itself", SHARE, "libc.prctl(62, 1, 0, 0, 0) == 0 and through('alone on its core')"),
    Attack(
        "another-user-of-its-namespace",
        CONFINED,
        """
for name, text in (("uid_map", "0 0 1"), ("gid_map", "0 0 1"), ("setgroups", "allow"), ("projid_map", "0 0 1")):
    try:
        with open(f"/proc/self/{name}", "w") as file: file.write(text)
        through(name)
    except OSError as error:
        print(name, error)
for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.setresuid(1, 1, 1)):
    try:
        act(); through("became another")
    except OSError as error:
        print(error)
""",
    ),
    Attack(
        "larger-files-in-memory",
        SHARE,
        """
for place in (b"/tmp", b"/dev/shm", b"/dev/pts"):
    libc.mount(None, place, None, 32, b"size=1g,nr_inodes=0,max=4096") == 0 and through(place)
    libc.umount2(place, 2) == 0 and through("unmounted", place)
""",
    ),
    takes("all-terminals", "os.openpty()", 64, 300, bites=True),
    takes(
        "all-files-in-memory",
        "os.close(os.open(f'/dev/shm/{len(made)}', os.O_CREAT))",
        66_000,
        70_000,
    ),
    takes(
        "all-message-queues",
        "got(libc.mq_open(f'/{len(made)}'.encode(), 0o102, 0o600, None))",
        256,
        400,
    ),
    takes("all-asynchronous-io", "got(libc.syscall(206, 1, ctypes.byref(ctypes.c_ulong())))", 64, 200),
    Attack(
        "room-for-filters",
        SHARE,
        """
code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))
program = (ctypes.c_ulong * 2)(1, ctypes.addressof(code))
libc.prctl(22, 2, program, 0, 0) == 0 and through("prctl")
libc.syscall(317, 1, 0, program) == 0 and through("seccomp")
""",
    ),
    Attack(
        "load-drivers-of-networks",
        KERNEL,
        """
for line in (socket.socket(), socket.socket(socket.AF_UNIX)):
    for request in (0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1):
        tried(16, line.fileno(), request, ctypes.create_string_buffer(64))
""",
    ),
    takes("all-watchers", "got(libc.inotify_init())", 1000, 1100),
    Attack(
        "pour-into-the-log",
        SHARE,
        """
ours, theirs = os.pipe()
os.write(theirs, bytes(65536))
end = time.monotonic() + 3
while time.monotonic() < end: libc.tee(ours, 1, 65536, 0)
""",
        codes=LIMITED,
    ),
    Attack(
        "read-its-own-output",
        SHARE,
        """
# Takes away what the one who reads has been told of.
fd = os.open("/dev/stdout", os.O_RDONLY | os.O_NONBLOCK)
end = time.monotonic() + 2
while time.monotonic() < end:
    os.write(1, b"x")
    try: os.read(fd, 1)
    except BlockingIOError: pass
""",
        codes=frozenset({"OK", "E_EXIT"}),
    ),
)
