"""Layouts: where each rank's local tensor lies in the global one, and what that means for two jobs.

dims, axes         what a user says: "b s h[tp] d", and where this rank stands on tp
dtensor            what a DTensor says of itself
declared           what one rank puts into its header (and `Layout`, explicit boxes)
places, cuts       all headers of a role -> who stands where on the mesh; how each dim is cut (runs)
shares             -> the part of the global tensor that each rank holds
common_dims        the dims of both sides: names and sizes that agree
space              what they make together: fused and split dims, the boxes of a share
holdings, meetings who has which boxes, and which of the two sides' boxes share places
resharding         -> which values go from whom to whom (coverage: all of them, from one owner each)
region             a part of a tensor as a strided view of it
token_rows         rows addressed by token: those that both sides have, numbered through, as a dim like any other
token_shares       -> the shares of the tensor [tokens, ...], and row_view, the rows of a local tensor that are in it
remembered         what was worked out, by what it follows from: the next step's rows are others, and most often as many
"""
