"""The directory that `grafter run --attach` puts first on a job's PYTHONPATH.

All that stands in it is `sitecustomize.py`, which every Python of a job runs at its start (docs/zero-code.md).
"""
