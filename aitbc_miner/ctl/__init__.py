"""The operator's command line, aitbc-minerctl.

* main: the program
* arguments: its command line
* ask: asks the miner; errors and exit codes
* logs: `logs -f`
* pages, history_page: the pages for people
* stopped_node: answers from the disk of a stopped node
"""
