"""The root process: it starts, watches and stops all others.

* loop: Supervisor: the loop; it waits for no network and no disk
* node_plan: NodePlan: what the supervisor is told to run
* children: Child, Keeper, OneShots: forks children, waits for their end, starts them again
* slot_pool: SlotPool: which slots there are, which job goes where
* running_slot: RunningSlot: a slot's rules, its worker, the limits in force
* job_index: JobIndex: what `jobs` shows
* job_use: what a running job uses
* control_api: ControlApi: answers the control socket
* slow_requests: SlowRequests: requests that a child answers
* slow_answers: what that child does
* adoption: workers of an earlier run, and orphans
* disk_watch: DiskWatch: free space: when pulling stops, when a sweep starts
* sweep: the child that removes directories of finished jobs
* shutdown: NodeShutdown: the order of the end
"""
