"""Control groups of version 2.

* group: a group: its files and its processes
* delegation: hands controllers on to the groups below
"""
