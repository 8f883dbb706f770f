"""Who this node is, and whom it believes.

* credentials: where secrets come from: env:, file:, credential:
* node_token: the line between agent and heartbeat on which the node's token comes
* receipts: checks the receipts that a coordinator has signed
"""
