"""The queue of jobs and reports that wait for a further attempt.

* interface: RetryQueue, which both backends implement
* sqlite: the backend in the node's own database
* redis: the backend in a Redis server, for a fleet of nodes
"""

from aitbc_miner.queue.interface import Claim, Kind, QueueError, RetryQueue, Task

__all__ = ["Claim", "Kind", "QueueError", "RetryQueue", "Task"]
