"""`grafter plan suggest`: the plan file's `names`, proposed from the module trees of two programs.

tree         a module tree with links, stacks of layers, and the regions between them
vocabulary   what modules are commonly called: q_proj ~ wq ~ query
shapes       weights: equal, divided by the tensor parallelism, padded, fused
assignment   one-to-one pairs of the highest total score
region       the modules of one layer, or of the model around its layers, paired
matching     two trees: regions within paired stacks, over all layers
pairs        what comes of it: pairs with their confidence and reasons, and what is left
names        pairs -> entries of the plan file
wording      the plan file's text
command      the command line
"""
