"""Names of signals. Not in `system`, so that the process of a task need not import ctypes."""

import signal


def signal_name(number: int) -> str:
    """Name a signal; a real-time signal has only a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
