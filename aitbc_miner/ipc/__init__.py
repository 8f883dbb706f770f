"""Messages between the node's processes.

* messages: every message, one union for each direction
* channel: typed frames over a pipe, never blocking
"""
