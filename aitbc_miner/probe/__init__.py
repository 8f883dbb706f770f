"""Facts of the machine.

* machine: the description for the coordinator, and the page for people
* topology: CPUs, cores, NUMA nodes, memory
"""
