"""Layouts: where each rank's local tensor lies in the global one, and what that means for two jobs.

dims, axes         what a user says: "b s h[tp] d", and where this rank stands on tp
dtensor            what a DTensor says of itself
declared           what one rank puts into its header (and `Layout`, explicit boxes)
places, shares     all headers of a role -> the part of the global tensor that each rank holds (runs)
space              the dims of both sides, brought together: names, sizes, fused and split dims
resharding         shares x shares -> which values go from whom to whom (pure)
region             a part of a tensor as a strided view of it
"""
