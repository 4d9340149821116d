"""The directory that `grafter doctor` puts on the PYTHONPATH of the commands that it runs.

It shares no code with the rest of grafter, which it checks. `sitecustomize.py` runs when a Python starts,
`_grafter_probe.py` once torch is loaded.
"""
