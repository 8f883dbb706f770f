"""What the node costs, beside doing without it.

* main: what `tools/bench` does
* preload: what preloading saves a task
* sandbox: what the sandbox costs a job
"""
