"""Takes memory until there is no more, to show what a slot's limit does."""


def run(mib: int) -> int:
    """Take `mib` MiB, one after the other."""
    taken = [bytearray(1 << 20) for _ in range(mib)]
    return len(taken)
