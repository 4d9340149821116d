"""`grafter plan suggest`: proposes the plan file's `names` from the module trees of two programs.

tree         a module tree with links, stacks of layers, and the regions between them
vocabulary   common names of modules: q_proj ~ wq ~ query
shapes       weights: equal, divided by the tensor parallelism, padded, fused
assignment   one-to-one pairs with the highest total score
region       pairs the modules of one layer, or of the model around its layers
matching     two trees: regions within paired stacks, over all layers
pairs        the result: pairs with their confidence and reasons, and what is left
names        pairs -> entries of the plan file
wording      the plan file's text
command      the command line
"""
