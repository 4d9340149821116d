"""Processes: whether one lives, and how one ended."""
