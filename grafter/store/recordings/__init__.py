"""Recordings: one job kept on disk, so that the other can be grafted from it later."""
