"""Which jobs wait to be tried again.

* interface: RetryQueue
* sqlite: in the node's own database
* redis, shared: in a Redis that a fleet of nodes shares
"""

from aitbc_miner.queue.interface import Claim, Kind, QueueError, RetryQueue, Task

__all__ = ["Claim", "Kind", "QueueError", "RetryQueue", "Task"]
