"""The process that talks to the coordinator about jobs. It runs as the user aitbc.

* loop: the process's loop; it hands each event to the part that it concerns
* context: what all parts are given: configuration, channel, records, thread pools
* pull: asks the coordinator for a job when a slot is free
* admission_queue: jobs on their way to a slot, one thread each
* admission: a job's way in: recorded, checked, acknowledged, its inputs fetched
* job_table: JobTable: which jobs there are, how far each has come, and which stage may follow
* progress: what is reported of running jobs, and when
* delivery_queue: which report is sent when
* delivery: sends one report, and records that it was accepted
* outcomes: the outcome of a job that nobody works on any more
* retries, retry_policy: a failed job is run again: here, elsewhere, or by the operator's word
* reconcile: our jobs against the coordinator's list
* idle_monitor: tells the operator why no jobs come
* recovery: reads the records at the start
* retention: which finished jobs may be removed
* fleet, fleet_watch: leases on jobs that nodes share through Redis
* anchor: whether the disk with the records is the one that was there before
* node_token: the line to the heartbeat on which the node's token comes
"""
