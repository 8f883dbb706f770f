"""Small helpers without knowledge of jobs or slots.

* clock: boot-time and wall clock
* backoff: the delay before the next attempt
* background: slow calls in threads
* fs: durable writes, directories without links
* locks: one process for each lock file
* log: JSON lines, masked secrets
* forgiving: lenient decoding of JSON, and the bound on its depth
* trust: checks who else can change a file of the operator
* limits: rlimits, nice and ionice of a process
* system, signals: prctl, boot id, the names of signals
* inherited: resets the state that a process inherits from its parent
* persisting: retries calls after a local fault
* notify: tells systemd the service's state
* web: addresses, time-outs, TLS and proxies of connections
* terminal: text that is safe on a terminal
* build: the version and fingerprint of the code
"""
