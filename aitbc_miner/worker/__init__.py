"""The worker: the root process of a slot, which runs the slot's jobs in turn.

* loop: Worker: the process
* context: SlotContext: the worker's knowledge of its slot
* link: SupervisorLink: messages and signals of the supervisor
* job_run: JobRun: prepares, runs, judges, collects, writes the outcome
* steps: the list of a job's steps, in their order
* hold: JobHold: the resources and results of a job so far
* workspace: a job's directories and their owners
* job_group: the cgroup of a job
* program: starts a job's program, and ends all its processes
* launch: pipes, sandbox and limits of a program
* prewarm: a process that imports modules before the next task
* monitor: a running job: output, reports, deadline, cancel
* disk_use: counts a job's files on disk
* job_log: logs/exec.log
* causes: finds the cause of a job's end by evidence
* artifacts: collects the delivered files
* cleanup: removes a job's remaining processes and memory
"""
