"""The kinds of work a job can ask for, one file each."""
