"""What the node tells of itself in numbers.

* metrics: Prometheus, over all processes
* counters: what is counted, kept over restarts
* sampling: use of slots and GPUs
* pages, httpd: /metrics and /healthz, and the server that answers them
"""
