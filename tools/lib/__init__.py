"""What several tools and the tests use.

* local_node: a whole node in a temporary directory
* marked_jobs: jobs that say when they run
* compiler: finds a C compiler
"""
