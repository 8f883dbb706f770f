"""Doubles of coordinators, to test nodes against.

* main: one of them as a program
* server: what each of them is to a test: a port, faults, the jobs of a directory
* exchange: how each answers a request: the fault due, the call, the reply
* faults: what can be made to go wrong with each call
* watched: what each knows: behind one lock, and to be waited for
* http: HTTP below the calls: bodies, forms, replies
* bootstrap, aitbc: the dialects
"""
