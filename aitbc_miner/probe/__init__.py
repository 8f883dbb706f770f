"""What this machine has.

* machine: what is told to the coordinator, and shown
* topology: CPUs, cores, NUMA nodes, memory
"""
