"""How a job is shut in: namespaces, system calls, user.

* bubblewrap: what a job sees
* private_mounts: the mounts of a job's own: terminals, /tmp, /dev/shm
* seccomp: which system calls a job may not make
* users: which user runs what
* spawn: forks into a control group, sets limits and user, executes; kills and reaps
"""
