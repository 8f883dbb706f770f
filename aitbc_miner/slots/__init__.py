"""What a slot is, where it fits, and what it may do next.

* spec: SlotSpec: a slot as plain data
* reader: reads slots.d, checks it, writes it
* derive: chooses what slots.d leaves to the node: CPUs, NUMA nodes, the whole layout
* fit: whether the slots fit this machine
* cpu_layout: which CPUs each gets
* placement: Offer, Ticket: which slot gets a job
* state: the table of a slot's states
* limits: which limits the cgroup holds, and which the job's process must carry
* cgroups, cgroup_limits: a slot's control groups and their limits
"""
