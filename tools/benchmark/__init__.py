"""Measures the cost of the node against runs without a node.

* main: the command `tools/bench`
* preload: the time that preloading saves a task
* sandbox: the time that the sandbox costs a job
"""
