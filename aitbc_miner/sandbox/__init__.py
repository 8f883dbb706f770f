"""The sandbox of a job: namespaces, system calls, user.

* bubblewrap: the job's view of the machine
* private_mounts: the job's private mounts: terminals, /tmp, /dev/shm
* seccomp: the system calls that a job may not make
* users: the users of the agent and of the slots' jobs
* spawn: forks into a control group, sets limits and user, executes; kills and reaps
"""
