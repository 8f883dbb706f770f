"""What the node requires of this machine, looked at before it starts.

* check: `aitbc-miner check`
* doctor: `aitbc-miner doctor`
* requirements: the one list of both
* confinement: whether jobs can be held and shut in here
* try_sandbox: makes a sandbox, and sees whether it holds
* sandbox_view: whether a program's files can be seen in it
* network: whether the coordinator can be reached
"""
