"""The demo: a coordinator, a node, real jobs of every kind; those of tasks/ and allowlist/ are made for it.

* main: what `tools/demo` does
"""
