"""Control groups of version 2.

* group: one group: its files, its processes
* delegation: hands controllers on to the groups below
"""
