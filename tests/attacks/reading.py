"""Attacks that read what is not theirs, and that send it somewhere."""

from tests.attacks.attack import Attack

CREDENTIALS = "the operator's credentials are his"
OTHERS = "a job knows nothing of other jobs"
MACHINE = "a job knows nothing of the machine"
NETWORK = "a job without a network reaches nobody"

READING = (
    Attack("read-token", CREDENTIALS, "print(read('/etc/aitbc/miner/token'))"),
    Attack("read-environment-file", CREDENTIALS, "print(read('/etc/aitbc/miner/environment'))"),
    Attack(
        "read-config",
        CREDENTIALS,
        "'auth_token' in read('/etc/aitbc/miner/config.yaml') and through('read it')",
    ),
    Attack(
        "read-environments", CREDENTIALS, "for path in glob.glob('/proc/[0-9]*/environ'): print(read(path))"
    ),
    Attack("read-shadow", CREDENTIALS, "':' in read('/etc/shadow') and through('read it')"),
    Attack(
        "read-credentials-of-units",
        CREDENTIALS,
        "for path in glob.glob('/run/credentials/*/*'): through(read(path))",
    ),
    Attack(
        "read-by-root-of-init",
        CREDENTIALS,
        """
for place in ("/proc/1/root", "/proc/1/cwd", "/proc/self/root/..", "/proc/thread-self/root"):
    for path in ("/etc/aitbc/miner/token", "/etc/shadow"):
        read(place + path) and through(place + path)
""",
    ),
    Attack(
        "read-by-descriptors",
        CREDENTIALS,
        """
for path in glob.glob("/proc/[0-9]*/fd/*"):
    try:
        target = os.readlink(path)
    except OSError:
        continue
    if int(path.split("/")[2]) not in own() and "/proc/" not in target:
        through(path, target)
""",
    ),
    Attack(
        "read-works-of-others",
        OTHERS,
        """
for path in glob.glob("/var/lib/aitbc/miner/jobs/*/*/*") + glob.glob("/var/lib/aitbc/*"):
    print(path, read(path))
print(read("/var/lib/aitbc/miner/jobs/<victim>/work/secret"))
""",
    ),
    Attack(
        "list-jobs",
        OTHERS,
        """
for place in ("/var/lib/aitbc/miner/jobs", "/var/lib/aitbc/miner", "/job/.."):
    try:
        names = os.listdir(place)
    except OSError:
        continue
    "<victim>" in names and through(names)
os.path.exists("/var/lib/aitbc/miner/jobs/<victim>") and through("it is there")
""",
        bites=True,
    ),
    Attack(
        "read-arguments-of-others",
        OTHERS,
        "for path in glob.glob('/proc/[0-9]*/cmdline'): print(read(path))",
        bites=True,
    ),
    Attack(
        "see-processes",
        MACHINE,
        """
others = [path for path in glob.glob("/proc/[0-9]*") if "systemd" in read(path + "/comm")]
others and through(others)
""",
        bites=True,
    ),
    Attack(
        "read-shared-memory-of-others",
        OTHERS,
        """
libc.shmat.restype = ctypes.c_void_p
for line in read("/proc/sysvipc/shm").splitlines()[1:]:
    address = libc.shmat(int(line.split()[1]), None, 0o10000)
    if address not in (None, ctypes.c_void_p(-1).value):
        print(ctypes.string_at(address, 64))
for path in glob.glob("/dev/shm/*"):
    print(path, read(path))
""",
        bites=True,
    ),
    Attack(
        "read-kernel-log",
        MACHINE,
        """
buffer = ctypes.create_string_buffer(4096)
got = libc.klogctl(3, buffer, 4096)
got > 0 and through("klogctl", got)
read("/dev/kmsg") and through("/dev/kmsg")
""",
    ),
    Attack(
        "read-journal", MACHINE, "for path in glob.glob('/var/log/journal/*/*'): read(path) and through(path)"
    ),
    Attack("read-machine-id", MACHINE, "read('/etc/machine-id') and through('it is known')", bites=True),
    Attack(
        "read-disks",
        MACHINE,
        """
for path in glob.glob("/dev/[svh]d*") + ["/dev/mem", "/dev/port", "/proc/kcore"]:
    read(path) and through(path)
""",
    ),
    Attack(
        "read-homes",
        MACHINE,
        """
for place in ("/root", "/home", "/srv", "/mnt", "/boot", "/opt"):
    try:
        os.listdir(place)
    except OSError as error:
        print(place, error)
    else:
        through(place)
""",
        bites=True,
    ),
    Attack(
        "learn-host-name", MACHINE, "'<host>' == socket.gethostname() and through('it is known')", bites=True
    ),
    Attack(
        "reach-coordinator",
        NETWORK,
        "socket.create_connection(('127.0.0.1', <port>), 10); through('connected')",
        bites=True,
    ),
    Attack(
        "reach-metrics",
        NETWORK,
        "socket.create_connection(('127.0.0.1', 9464), 10); through('connected')",
        bites=True,
    ),
    Attack(
        "reach-abstract-socket",
        NETWORK,
        "line = socket.socket(socket.AF_UNIX); line.connect(chr(0) + '<abstract>'); through('connected')",
        bites=True,
    ),
    Attack(
        "reach-control-socket",
        NETWORK,
        "line = socket.socket(socket.AF_UNIX); line.connect('/run/aitbc-miner/control.sock'); through('connected')",
    ),
    Attack(
        "reach-system-bus",
        NETWORK,
        """
for path in ("/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/journal/stdout"):
    try:
        line = socket.socket(socket.AF_UNIX); line.connect(path); through(path)
    except OSError as error:
        print(path, error)
""",
        bites=True,
    ),
    Attack(
        "listen-for-others",
        NETWORK,
        """
server = socket.create_server(("0.0.0.0", <free>)); server.settimeout(20)
print("listens", flush=True)
open("listens", "w").close()
server.accept(); through("somebody came")
""",
        bites=True,
    ),
    Attack(
        "raw-sockets",
        NETWORK,
        """
for family, kind, protocol in ((17, 3, 3), (2, 3, 1), (16, 3, 9), (38, 5, 0), (40, 1, 0), (29, 3, 1), (31, 3, 1)):
    try:
        socket.socket(family, kind, protocol); through(family, kind, protocol)
    except OSError as error:
        print(family, error)
""",
    ),
    Attack(
        "change-routes",
        NETWORK,
        """
line = socket.socket(16, 3, 0)
# RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, interface 1 (lo): down.
line.send(struct.pack("=LHHLLBBHiLL", 32, 16, 5, 1, 0, 0, 0, 0, 1, 0, 1))
code = struct.unpack_from("=i", line.recv(4096), 16)[0]
print(code); code == 0 and through("the loopback is down")
""",
    ),
)
