"""Faults for real nodes: kills, lost answers and disk errors, and checks of the nodes' jobs after them.

* main: the command line of `tools/faults`
* campaign: kills the processes of a node again and again, then checks the node
* plan: the boundaries of a node's steps, and the sequence of faults
* steps: observes every step and stops a process at a boundary, together with shim.c
* node: finds and kills a node's processes
* jobs: the jobs of a campaign
* redis: a real Redis, which a campaign also kills
* checks: the conditions that must hold after a campaign
* scenarios: a coordinator that is away, or loses its answers
* inject: makes system calls fail, one after the other, or kills the process at each call
* answers: odd answers of a coordinator
"""
