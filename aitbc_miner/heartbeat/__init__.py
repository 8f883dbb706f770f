"""The heartbeat process registers the node and sends heartbeats. It runs as the user aitbc.

* loop: HeartbeatProcess, the main loop
* registration: the node token and the client that uses the token
* status_report: the slots in a heartbeat; remedies for the coordinator's errors
"""
