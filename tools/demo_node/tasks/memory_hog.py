"""Allocates memory without end, to show a slot's memory limit."""


def run(mib: int) -> int:
    """Allocate `mib` MiB in steps of 1 MiB."""
    taken = [bytearray(1 << 20) for _ in range(mib)]
    return len(taken)
