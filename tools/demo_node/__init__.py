"""The demo: a coordinator, a node and real jobs of every kind. tasks/ and allowlist/ serve the demo only.

* main: the command `tools/demo`
"""
