"""The operator's command line, aitbc-minerctl.

* main: the program
* arguments: its command line
* pages, history_page: what people read
* stopped_node: what can be told of a node that does not run
"""
