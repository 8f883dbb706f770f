"""The double of dialect `bootstrap`, the reference for the node's tests.

* coordinator: MockCoordinator, the double for a test
* handler: one method for each call
* ledger: the jobs, their nodes, and every report
* records: jobs, nodes, reports and requests
* pages: the page, JSON, input files
* client: a small node that runs nothing
"""
