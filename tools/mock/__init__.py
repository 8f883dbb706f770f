"""Doubles of coordinators, to test nodes against.

* main: a double as a program
* server: a double in a test: a port, faults, the jobs of a directory
* exchange: answers a request: the due fault, the call, the reply
* faults: the faults of calls
* watched: the state of a double, behind a lock, with a method to wait for a state
* http: HTTP below the calls: bodies, forms, replies
* bootstrap, aitbc: the dialects
"""
