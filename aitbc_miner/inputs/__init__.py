"""Fetches the inputs of a job, and decides from which addresses the node may fetch.

* fetch: fetches the inputs: resumes transfers, checks hashes, keeps limits
* urls: which names an input may have, and which URLs the node fetches
* addresses: which addresses belong to this machine or to its neighbours
"""
