"""Attacks that use up what others need, or that go on when they should be over."""

from tests.attacks.attack import Attack

SHARE = "a job takes nothing from others"
OVER = "what is over is over"
LIMITED = frozenset({"OK", "E_EXIT", "E_SIGNAL", "E_OOM", "E_PIDS", "E_OUTPUT", "E_DISK", "E_TIMEOUT"})

STARVING = (
    Attack(
        "forks",
        SHARE,
        """
made = 0
for _ in range(400):
    try:
        if os.fork() == 0:
            time.sleep(1000)
        made += 1
    except OSError as error:
        print(made, error, flush=True)
        break
made > 64 and through(made)
sys.exit(1)
""",
        codes=LIMITED,
    ),
    Attack(
        "forks-for-ever",
        SHARE,
        """
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        codes=LIMITED,
        more={"timeout_s": 8},
    ),
    Attack("memory", SHARE, "x = bytearray(400 << 20); through(len(x))", codes=LIMITED),
    Attack(
        "memory-of-many",
        SHARE,
        """
ready, told = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(60 << 20)
        os.write(told, b"x")
        time.sleep(20)
        os._exit(0)
os.close(told)
sum(len(os.read(ready, 1)) for _ in range(8)) == 8 and through("all of it")
sys.exit(1)
""",
        codes=LIMITED,
    ),
    Attack(
        "memory-in-files",
        SHARE,
        """
for place in ("/dev/shm", "/tmp"):
    size = 0
    try:
        with open(place + "/much", "wb", buffering=0) as file:
            while size < 300 << 20:
                size += file.write(bytes(1 << 20))
    except OSError as error:
        print(place, size, error, flush=True)
    size >= 300 << 20 and through(place)
""",
        codes=LIMITED,
    ),
    Attack(
        "left-in-memory",
        OVER,
        """
import uuid
for path in ("/dev/shm/left", "/dev/mqueue/left", "/tmp/left", "/var/tmp/left", "/run/lock/left", "/job/left"):
    try:
        os.path.exists(path) and through(path)
        open(path, "w").close()
    except OSError as error:
        print(path, error)
libc.shmget(0x1eef, 4096, 0) >= 0 and through("shared memory")
libc.shmget(0x1eef, 4096, 0o1666)
""",
        more={"again": True},
    ),
    Attack(
        "large-file",
        SHARE,
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwith open('large', 'wb') as f:\n    for _ in range(80): f.write(bytes(1 << 20))\nthrough('80 MiB')",
        codes=LIMITED,
    ),
    Attack(
        "log-flood",
        SHARE,
        "line = b'x' * 1023 + b'\\n'\nfor _ in range(30 << 10): os.write(1, line)",
        codes=LIMITED,
    ),
    Attack(
        "descriptors",
        SHARE,
        "made = []\ntry:\n    while True: made.append(os.open('/dev/null', 0))\nexcept OSError as error: print(len(made), error)\nlen(made) > 70000 and through(len(made))",
        codes=LIMITED,
    ),
    Attack(
        "pipes",
        SHARE,
        "made = []\ntry:\n    while True:\n        ends = os.pipe(); made.append(ends); fcntl.fcntl(ends[1], 1031, 1 << 20)\nexcept OSError as error: print(len(made), error)",
        codes=LIMITED,
    ),
    Attack(
        "large-arguments",
        SHARE,
        "word = 'x' * 100000\nsubprocess.run(['/bin/true', *[word] * 15], env={'X' + str(i): word for i in range(4)})",
        codes=LIMITED,
    ),
    Attack(
        "semaphores",
        SHARE,
        """
made = 0
while made < 1 << 15 and libc.semget(0, 1, 0o1666) >= 0:
    made += 1
print(made, flush=True)
open("held", "w").close()
time.sleep(20)
""",
        bites=True,
        codes=LIMITED,
    ),
    Attack(
        "daemon",
        OVER,
        """
for sort in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(sort, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        libc.prctl(1, 0)
        os.execv("/usr/bin/python3", ["<process>", "-c", "import time; time.sleep(3000)"])
    os._exit(0)
time.sleep(1)
""",
    ),
    Attack(
        "later-by-cron",
        OVER,
        """
for argv in (["crontab", "-"], ["at", "now"], ["systemd-run", "--user", "sleep", "3000"], ["systemd-run", "sleep", "3000"]):
    try:
        done = subprocess.run(argv, input=b"* * * * * sleep 3000\\n", capture_output=True, timeout=20)
        print(argv, done)
        done.returncode == 0 and through(argv)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(argv, error)
""",
    ),
    Attack(
        "deaf",
        OVER,
        "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(100)",
        codes=frozenset({"E_TIMEOUT"}),
        more={"timeout_s": 5},
    ),
    Attack(
        "stopped",
        OVER,
        "os.kill(os.getpid(), signal.SIGSTOP)",
        codes=frozenset({"E_TIMEOUT"}),
        more={"timeout_s": 5},
    ),
)
