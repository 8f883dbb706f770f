"""What is measured in the texts of the code, and drawn from its tables.

* plain_words: the share of pronouns and fillers in docstrings and messages
* state_diagrams: the diagrams in docs/architecture.md
"""
