"""The root process of a slot: it runs one job after another.

* loop: Worker: the process
* context: SlotContext: what it knows of its slot
* link: what ties a worker to its supervisor
* job_run: JobRun: prepares, runs, judges, collects, writes the outcome
* steps: what a job holds while it runs: the list of steps, in their order
* hold: JobHold: what a job holds, and what has come of it so far
* workspace: a job's directories and their owners
* job_group: the cgroup of one job
* program: the start of a job's program, and the end of all that it has started
* launch: starts a program: pipes, sandbox, limits
* prewarm: a process that has imported modules ahead
* monitor: a running job: output, reports, deadline, cancel
* disk_use: how much it has on disk
* job_log: logs/exec.log
* causes: why a job ended, by evidence
* artifacts: collects what is delivered
* cleanup: what a job left
"""
