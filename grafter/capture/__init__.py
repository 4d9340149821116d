"""Capture: points of a running program that nobody wrote into it.

    selection            which modules: patterns over path and class
    naming               a module's path -> the name and tags that both jobs share
    containers           a module's inputs and outputs -> their tensors, by path, and back
    untraced             hooks as torch.compile leaves them alone
    model_forward        the model itself, whose `forward` is wrapped
    module_tree          a model's modules as data, in the run's directory, for `grafter plan suggest`
    attachment           hooks on the selected modules of one model; `grafter.attach` makes one
    parameters           `grafter.dump_model`: weights and buffers as points
    parameter_gradients  hooks that tell when a parameter's gradient has been added up

and for programs that never import grafter:

    startup              the start-up module that Python finds first on its path, and waits for torch
    first_call, roots    the first call of each model, and its attachment
    steps                what counts as a step where nobody calls `grafter.step()`
    adapters             mesh axes, read from the frameworks that this process uses
"""
