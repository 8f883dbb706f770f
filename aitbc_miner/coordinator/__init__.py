"""The clients for coordinators, one module for each dialect.

* interface: Coordinator, its values and errors
* connect: makes the configured client
* transport, http: bounded HTTP
* answers: the meaning of each reply to each call
* bootstrap: the dialect `bootstrap`
* aitbc, aitbc_wire: the dialect `aitbc-v1`, and its JSON
* services, service_result: services.d: makes manifests from payloads, and results for clients
* job_failure: the report of a failed job, for clients
* rate_limits: counts calls a minute, in a file that all processes lock
* broken_json: finds the id of a job in broken JSON
* why_idle, diagnosis: why no jobs come, and which setting is wrong
"""
