"""The operator's command line, aitbc-minerctl.

* main: the program
* arguments: its command line
* ask: asks the daemon; errors and exit codes
* logs: `logs -f`
* pages, history_page: what people read
* stopped_node: what can be told of a node that does not run
"""
