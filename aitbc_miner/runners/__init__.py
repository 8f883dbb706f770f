"""The kinds of work that a job can ask for, one module for each.

* interface: Runner, Launch, Verdict
* registry: the runners that are enabled
* cli: runs a program of the allowlist
* python: runs a task
* interpreter: the Python that tasks run in
* task_catalogue, task_reader: the list of the node's tasks, and the process that describes tasks
* task_child: the process that runs a task
"""
