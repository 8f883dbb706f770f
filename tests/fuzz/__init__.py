"""Hostile input for every decoder of what comes from outside: small under pytest, long by `tools/fuzz`."""
