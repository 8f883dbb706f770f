"""The programs that jobs may run, and the arguments that jobs may give them.

* entries: one file for each program: Entry, Allowlist, permit()
* rules: sections, options and operands as the operator wrote them
* grammar: whether a list of arguments fits the sections
* values: the kinds of value
* patterns: RE2 patterns, and a bound on the work of matching
* abuse: known ways to abuse a program, for the warnings of `check`
"""
