"""The double of dialect `bootstrap`, by which the node is judged.

* coordinator: MockCoordinator: what a test starts
* handler: one method for each call
* ledger: which jobs there are, who holds them, every report that came
* records: jobs, nodes, reports and requests
* pages: what it shows: a page, JSON, input files
* client: a node in a few lines that runs nothing
"""
