"""The kinds of work that a job can ask for; one module each.

* interface: Runner, Launch, Verdict
* registry: the runners that are enabled
* cli: runs a program of the allowlist
* python: runs a task
* interpreter: the Python that tasks run in
* task_catalogue, task_reader: which tasks there are, and the process that describes them
* task_child: the process of a task
"""
