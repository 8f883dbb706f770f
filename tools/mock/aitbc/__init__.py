"""The strict double of dialect `aitbc-v1`: the AITBC coordinator as deployed, with its limits and traps.

* coordinator: MockAitbc, the double for a test
* handler: one method for each call
* wire: the calls with their parameters, rate limits and errors
* auth: JSON web tokens and API keys
* ledger: chooses the miner of a job, and applies reports
* records: jobs, miners and reports; which miner can take which job
* receipts: receipts, signed before their last fields are added
* pages: the page for people and JSON for programs
* client: a small miner that runs nothing, and its client
"""
