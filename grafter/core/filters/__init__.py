"""Filters: expressions over a point's tags, which have no access to Python.

syntax                the whitelist, and the place and text of a fault
operations            what the operators do if a tag is absent or of another type
regular_expressions   patterns, matched in linear time
expression            a filter, compiled once
"""
