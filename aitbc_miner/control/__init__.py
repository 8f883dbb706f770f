"""The control socket, over which `aitbc-minerctl` asks the node.

* protocol: the verbs, requests and answers
* client: ask()
* server: serves the socket: peers, permissions, time-outs
* listening: makes the socket
"""
