"""Capture: points of a running program that nobody wrote into it.

selection      which modules: patterns over path and class
naming         a module's path -> the name and tags that both jobs share
containers     a module's inputs and outputs -> their tensors, by path, and back
untraced       hooks as torch.compile leaves them alone
model_forward  the model itself, whose `forward` is wrapped
module_tree    a model's modules as data, in the run's directory, for `grafter plan suggest`
attachment     hooks on the selected modules of one model; `grafter.attach` makes one
parameters     `grafter.dump_model`: weights and buffers as points
"""
