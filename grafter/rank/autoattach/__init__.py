"""Automatic attaching: points in programs that never import grafter."""
