"""The AITBC miner node: runs other people's jobs in slots of this machine and delivers every result."""

__version__ = "0.1.0"
