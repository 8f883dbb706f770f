"""What a slot is, where it fits, and what it may do next.

* spec: SlotSpec, and slots.d, from which it is read
* fit: whether the slots fit this machine
* cpu_layout: which CPUs each gets
* placement: which slot gets a job
* state: the table of a slot's states
* cgroups, cgroup_limits: a slot's control groups and their limits
"""
