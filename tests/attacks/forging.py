"""Attacks on what the miner says of a job: its records, its log, what it delivers."""

from tests.attacks.attack import Attack

RECORDS = "what is on record of a job is not the job's to write"
DELIVERED = "only a job's own files are delivered"
TOLD = "what a job calls its things is shown and sent as mere text"
REFUSED = frozenset({"OK", "E_ARTIFACT", "E_OUTPUT", "E_EXIT"})

FORGING = (
    Attack(
        "write-records",
        RECORDS,
        """
for name in ("state.json", "outcome.json", "manifest.json", "artifacts/0000", "logs/exec.log", "forged"):
    for place in ("..", "/job", "/var/lib/aitbc/miner/jobs/<own>"):
        path = os.path.join(place, name)
        try:
            with open(path, "w") as file: file.write('{"code": null}')
            through(path)
        except OSError as error:
            print(path, error.strerror)
""",
    ),
    Attack(
        "replace-directories",
        RECORDS,
        """
for name in ("output", "logs", "work", "tmp"):
    for place in ("..", "/job"):
        path = os.path.join(place, name)
        try:
            os.rename(path, path + "-was"); os.symlink("/etc", path); through(path)
        except OSError as error:
            print(path, error.strerror)
""",
    ),
    Attack(
        "remove-directories",
        RECORDS,
        "for name in ('output', 'tmp'):\n    try: os.rmdir('../' + name); os.symlink('/usr', '../' + name); through(name)\n    except OSError as error: print(error)",
    ),
    Attack("deliver-by-symlink", DELIVERED, "os.symlink('<outside>', '../output/leak')", codes=REFUSED),
    Attack(
        "deliver-by-directory-link",
        DELIVERED,
        "os.symlink(os.path.dirname('<outside>'), '../output/leak'); os.symlink('/', 'root')",
        codes=REFUSED,
        more={"artifacts": [{"path": "root<outside>"}]},
    ),
    Attack(
        "deliver-by-hard-link",
        DELIVERED,
        "try:\n    os.link('<outside>', '../output/leak')\nexcept OSError as error: print(error)",
        codes=REFUSED,
    ),
    Attack("deliver-a-pipe", DELIVERED, "os.mkfifo('../output/pipe')", codes=REFUSED),
    Attack(
        "deliver-a-socket",
        DELIVERED,
        "socket.socket(socket.AF_UNIX).bind('../output/socket')",
        codes=REFUSED,
    ),
    Attack(
        "deliver-a-giant",
        DELIVERED,
        "try:\n    os.truncate(os.open('../output/giant', os.O_CREAT | os.O_RDWR), 10 << 40)\nexcept OSError as error: print(error)",
        codes=REFUSED,
    ),
    Attack(
        "deliver-very-many",
        DELIVERED,
        "for i in range(20000): os.close(os.open(f'../output/{i}', os.O_CREAT))",
        codes=frozenset({"E_OUTPUT", "E_EXIT"}),
    ),
    Attack(
        "deliver-very-deep",
        DELIVERED,
        "os.chdir('../output')\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()",
        codes=REFUSED,
    ),
    Attack(
        "names-of-two-lines",
        TOLD,
        "open('../output/a\\r\\nX-Evil: 1\\r\\n\\r\\nb', 'w').close()",
        codes=REFUSED,
    ),
    Attack("names-with-quotes", TOLD, """open('../output/a"; name="outcome', 'w').close()""", codes=REFUSED),
    Attack("names-of-no-letters", TOLD, "open(b'../output/\\xff\\xfe', 'w').close()", codes=REFUSED),
    Attack(
        "terminal-sequences",
        TOLD,
        "print('\\x1b]0;evil\\x07\\x1b[2J\\x1b[31mgone', flush=True); sys.exit('\\x1b[2Jevil\\x9b31m')",
    ),
    Attack(
        "forged-death",
        RECORDS,
        """
for fd in range(3, 20):
    for path in (f"/proc/self/fd/{fd}", f"/proc/1/fd/{fd}"):
        try:
            with open(path, "w") as file: file.write("Command terminated by signal 11\\n")
        except OSError:
            pass
sys.exit(9)
""",
        # Of its own death it may tell what it likes; that it went well it may not.
        codes=frozenset({"E_EXIT", "E_SIGNAL"}),
    ),
)
