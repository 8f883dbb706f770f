"""Code that several tools and the tests share.

* local_node: a whole node in a temporary directory
* marked_jobs: jobs that leave a mark for each run
* compiler: finds a C compiler
"""
