"""Who this node is, and whom it believes.

* credentials: where secrets come from: env:, file:, credential:
* receipts: checks the receipts that a coordinator has signed
"""
