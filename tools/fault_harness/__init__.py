"""Kills, lost answers and failing disks for real nodes, and a count of what that did to their jobs.

* main: the command line of `tools/faults`
* campaign: one node, killed again and again, and then looked at
* plan: the boundaries of a node's steps, and which fault comes when
* steps: knows of every step, holds a process at one; shim.c is its other end
* node: who of a node's processes is who, and how each is ended
* jobs: the jobs of a campaign
* redis: a real Redis, which is killed as well
* checks: what must hold when a campaign is over
* scenarios: a coordinator that is away, or whose answers are lost
* inject: one system call after the other fails, or is the last
* answers: what comes of odd answers of a coordinator
"""
