"""Checks the machine before the node starts.

* check: `aitbc-miner check`
* doctor: `aitbc-miner doctor`
* requirements: the list that both go through
* confinement: finds the cgroups and the sandbox for jobs
* try_sandbox: `aitbc-minerctl sandbox`
* sandbox_view: whether a program's files are visible in the sandbox
* network: whether the coordinator can be reached
"""
