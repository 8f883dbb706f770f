"""What is said to a coordinator; one module a dialect.

* interface: Coordinator, its values and errors
* connect: makes the configured client
* transport, http: bounded HTTP
* answers: which answer to which call means what
* bootstrap: the dialect `bootstrap`
* aitbc, aitbc_wire: the dialect `aitbc-v1`, and its JSON
* services, service_result: services.d: which payload becomes which job, and what becomes of its result
* job_failure: what is told of a job that failed
* rate_limits: calls a minute, in a file that all processes lock
* broken_json: finds the id of a job in JSON that is broken
* why_idle, diagnosis: why no jobs come, and which setting is to blame
"""
