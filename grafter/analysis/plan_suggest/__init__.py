"""`grafter plan suggest`: proposes the plan file's `names` from the module trees of two programs.

tree              a module tree with links, stacks of layers, and the regions between them
vocabulary        common names of modules: q_proj ~ wq ~ query
shapes            how weights relate: equal, divided by the tensor parallelism, padded, fused
suggestion        the result: pairs with their confidence and reasons, and the modules without a pair
confidence        how sure a pair is, and the reasons in words
region_matching   pairs the modules of one layer, or of the model around its layers
tree_matching     pairs two trees: regions within paired stacks, over all layers
name_entries      pairs -> entries of the plan file
plan_text         the text of the plan file
"""
