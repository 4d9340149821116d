"""Filters: expressions over a point's tags that can reach nothing of Python.

syntax                the whitelist, and the place and wording of a fault
operations            what the operators do where a tag is absent or of another type
regular_expressions   patterns, matched in linear time
expression            a filter, compiled once; whether it could ever match
"""
