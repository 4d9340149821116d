"""Layouts: where each rank's local tensor lies in the global one, and what that means for two jobs.

axes, dims       what a user declares: "b s h[tp] d", and where this rank stands on tp
dtensor          what a DTensor says of itself
declared         what one rank puts into its header; `Layout`, explicit boxes
places, cuts     all headers of a role -> who stands where on the mesh; how each dim is cut (runs)
shares           -> the part of the global tensor that each rank holds
common_dims      the dims of both sides: names and sizes that agree
space            the common coordinates of both sides: fused and split dims, the boxes of a share
overlap          whether boxes overlap
overlap_table    which boxes of the two sides overlap, and the strided views of what they share
coverage         which boxes each rank holds, and whether together they hold the whole tensor
row_view         the rows of a local tensor that count
row_numbering    the tokens that both sides have, numbered: rows that are addressed by token become a dim like any other
"""
