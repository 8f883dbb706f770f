"""The root process: starts, watches and stops the node's other processes.

* loop: Supervisor: the loop; it waits for no network and no disk
* node_plan: NodePlan: the slots to run, and how their workers start
* children: Child, Keeper, OneShots: forks children, waits for their end, starts them again
* slot_pool: SlotPool: the slots, and which job goes where
* running_slot: RunningSlot: a slot's rules, its worker, the limits in force
* job_index: JobIndex: the jobs that `aitbc-minerctl jobs` shows
* job_use: the CPU time, memory and disk space of a running job
* control_api: ControlApi: answers the control socket
* slow_requests: SlowRequests: starts a child for each request that needs the disk
* slow_answers: the work of these children
* adoption: workers of an earlier run, and orphans
* disk_watch: DiskWatch: free space: when pulling stops, when a sweep starts
* sweep: the child that removes directories of settled jobs
* shutdown: NodeShutdown: the order in which the processes stop
"""
