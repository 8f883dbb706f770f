"""The node's data on its disk.

* database: an SQLite file, written through to the disk
* records: a directory for each job, with its state and outcome
* ledger: use and pay of each job
* reserve: disk space set aside for records
"""
