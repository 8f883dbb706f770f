"""The strict double of dialect `aitbc-v1`: the AITBC coordinator as deployed, with its limits and traps.

* coordinator: MockAitbc: what a test starts
* handler: one method for each call
* wire: its calls, what each takes, its limits, its shapes of errors
* auth: JSON web tokens and API keys
* ledger: who gets which job, and what each report changes
* records: jobs, miners and reports; who can take what
* receipts: receipts: signed first, and then added to
* pages: what it shows to people and programs
* client: a miner in a few lines that runs nothing, and its client
"""
