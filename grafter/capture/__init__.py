"""Capture: points of a running program that were not written into it.

selection            which modules the user's patterns select
naming               a module's path -> the name and tags that both jobs share
containers           a module's inputs and outputs -> their tensors, by path, and back
attachment           hooks on the selected modules of one model; `grafter.attach` makes one
attached_models      all attached models of this rank
model_forward        the model itself, whose `forward` is wrapped
model_variables      which variables of the program hold a model
passes               the forward passes of a rank's models, counted
traced               a hook's points in code that is being compiled
compiled, operators  points in compiled code, as operators of its graph
copies               saved and copied models, which have no hooks
packing              lengths of packed sequences, which context parallelism needs
module_tree          a model's modules as data, in the run's directory, for `grafter plan suggest`
parameters           `grafter.dump_model`: weights and buffers as points; hooks for gradients of weights
adapters             mesh axes, read from the frameworks that this process uses
"""
