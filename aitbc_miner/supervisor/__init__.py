"""The root process: it starts, watches and stops all others.

* loop: Supervisor: the loop; it waits for no network and no disk
* children: forks children, waits for their end, starts them again
* slot_pool: SlotPool: which slots there are, which job goes where
* running_slot: RunningSlot: a slot's rules, its worker, the limits in force
* job_index: what `jobs` shows
* job_use: what a running job uses
* control_api: answers the control socket
* reload, allowing, historian, history: answers for which a child works
* adoption: workers of an earlier run, and orphans
* disk_watch, sweep: free space; removes directories of finished jobs
* shutdown: the order of the end
"""
