"""The directory that `grafter doctor` puts on the PYTHONPATH of the commands that it runs.

It shares no code with the rest of grafter, which it watches. `sitecustomize.py` runs when a Python starts,
`_grafter_witness.py` once torch is loaded.
"""
