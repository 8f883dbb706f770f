"""Slots: their limits and CPUs, their control groups, their states, and the choice of a slot for a job.

* spec: SlotSpec: a slot as plain data
* reader: reads, checks and writes slots.d
* derive: chooses CPUs and NUMA nodes, or the whole layout, if slots.d leaves the choice to the node
* fit: whether the slots fit this machine
* cpu_layout: divides the CPUs among the slots
* placement: Offer, Ticket: chooses the slot for a job
* state: the state machine of a slot
* limits: divides a slot's limits between its cgroup and the job's process
* cgroups, cgroup_limits: a slot's control groups and their limits
"""
