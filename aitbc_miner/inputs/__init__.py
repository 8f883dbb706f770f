"""Where a job's inputs come from, and which addresses a stranger may have the node fetch from.

* fetch: fetches the inputs: resumed, hashed, bounded
* urls: what an input may be called, and which URLs are fetched at all
* addresses: which addresses are this machine's own, or its neighbours'
"""
