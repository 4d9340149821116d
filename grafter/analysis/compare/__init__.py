"""`grafter compare`: compares two jobs' dumps point by point: how far apart, whether that matters, where it begins.

    point_pairs          which points belong together, and the points that only one side has
    gathered_rows        rows of several points as one tensor, and the token of each row
    paired_rows          the rows of both sides that are the same tokens: prefill and decode against one packed batch
    alignment            two tensors in one order of dims, read block by block
    measuring            the measures of a pair (grafter.core.measures) and of differing copies
    other_leaves         leaves that are not tensors, and tensors that were not saved
    point_comparison     one pair of points, judged by its rule
    conclusion           which modules are at fault, and the outcome in words
    comparison           all of A against all of B
    comparison_records   the outcome as JSON lines, with a schema

The thresholds are in grafter.config.thresholds, the command and its table in grafter.cli. Nothing is imported here:
`grafter --help` should not wait for torch and rich.
"""
