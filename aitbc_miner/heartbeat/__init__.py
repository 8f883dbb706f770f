"""The process that registers the node and beats. It runs as the user aitbc.

* loop: HeartbeatProcess: registers, beats, samples
* registration: the node's token, and the client that uses it
* status_report: what a heartbeat says of the slots
"""
