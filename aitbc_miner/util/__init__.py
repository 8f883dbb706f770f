"""Small helpers that know nothing of jobs or slots.

* clock: boot-time and wall clock
* backoff: how long to wait before the next attempt
* background: calls beside a loop
* fs: durable writes, no link followed
* locks: files that only one process may hold
* log: JSON lines, masked secrets
* forgiving, nesting: JSON of another version, and how deep it may go
* trust: whether a file of the operator's may be trusted
* limits: rlimits, nice and ionice of a process
* system, signals: prctl, boot id, the names of signals
* inherited: what a process does not take over from its parent
* persisting: calls that a local fault kept from being done, until they are
* notify: tells systemd how the service is
* web: connections: addresses, time-outs, TLS, proxies
* terminal: what may be shown on a terminal
* build: which code this is
"""
