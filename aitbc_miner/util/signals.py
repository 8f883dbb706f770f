"""Signals by name. Apart from `system`, because the child of every task imports this."""

import signal


def signal_name(number: int) -> str:
    """Name a signal; those for real-time use have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
