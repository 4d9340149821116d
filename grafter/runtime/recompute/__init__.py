"""Recomputation: points that fire again when activation checkpointing recomputes a forward pass.

gradients    a point's gradient: offered when it comes, in any order
recompute    what happens to points in checkpointed regions, of any of torch's kinds
regions      a checkpointed region: context, step and counters of its forward pass, restored for its recomputation
kept_writes  what was written in a region, to be written again
"""
