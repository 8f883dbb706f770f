"""The node's metrics and health.

* metrics: the metrics for Prometheus, over all processes
* counters: the counters, kept over restarts
* sampling: use of slots and GPUs
* pages, httpd: the pages /metrics and /healthz, and their HTTP server
"""
