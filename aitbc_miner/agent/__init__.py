"""The process that talks to the coordinator about jobs. It runs as the user aitbc.

* loop: the process's loop; hands each event to the right part
* context: shared by all parts: configuration, channel, records, thread pools
* pull: asks the coordinator for a job if a slot is free
* admission_queue: jobs on their way to a slot, each in a thread
* admission: admits a job: records, checks and acknowledges it, and fetches its inputs
* job_table: JobTable: all jobs, the stage of each, and the legal moves between stages
* progress: reports the progress of running jobs
* delivery_queue: decides when to send each report
* delivery: sends one report, and records that the coordinator accepted it
* outcomes: writes the outcome of a job without a worker
* retries, retry_policy: run a failed job again: here, elsewhere, or when the operator asks
* reconcile: compares our jobs with the coordinator's list
* idle_monitor: tells the operator why no jobs come
* recovery: reads the records at the start
* retention: decides which finished jobs the supervisor may remove
* fleet, fleet_watch: leases on jobs that nodes share through Redis
* anchor: checks that the disk with the records is the same as before
* node_token: the line to the heartbeat, which sends the node's token
"""
