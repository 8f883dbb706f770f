"""What the node keeps on its disk.

* database: SQLite, written through
* records: a directory for each job, with its state and outcome
* ledger: what each job used and earned
* reserve: room that is kept for the node itself
"""
