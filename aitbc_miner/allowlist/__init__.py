"""Which programs a job may ask for, and with which arguments.

* entries: one file a program: Entry, Allowlist, permit()
* rules: sections, options and operands as the operator wrote them
* grammar: whether a list of arguments fits them
* values: the kinds of value
* patterns: RE2 patterns, and what they cost
* abuse: known ways to abuse a program, for the warnings of `check`
"""
