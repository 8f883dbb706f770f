"""The node's credentials, and the signatures that the node checks.

* credentials: reads secrets from env:, file: and credential: sources
* receipts: checks a coordinator's signed receipts
"""
