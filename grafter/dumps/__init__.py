"""Dumps: a run's memory. Chosen points on disk, written beside the run and read back without trust.

record      what is known of one dumped point: the schema of the files
"""
