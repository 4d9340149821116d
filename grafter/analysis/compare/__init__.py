"""`grafter compare`: what two jobs dumped, point by point: how far apart, whether that matters, where it begins.

    thresholds         what a difference may be, by the name of the point
    pairs              which points belong together; what only one side has
    token_rows         rows of several points as one tensor, and which token each of them is
    paired_rows        the rows of both sides that are the same tokens: prefill and decode against one packed batch
    alignment          two tensors in one order of dims, read block by block
    measuring          the pair measured (grafter.core.measures), copies on the way
    other_leaves       what of a point is no tensor, and tensors that were not saved
    point_comparison   one point judged by its rule
    severity           whether a module made its output bad, or was given bad inputs
    comparison         all of A with all of B
    record             the outcome as JSON lines, with a schema
    wording, table     the outcome in words, and to look at
    command            `grafter compare` itself

Nothing is imported here: `grafter --help` should not wait for torch and rich.
"""
