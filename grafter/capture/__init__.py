"""Capture: points of a running program that nobody wrote into it.

    patterns             what a user writes to select modules
    selection            which modules those are
    naming               a module's path -> the name and tags that both jobs share
    containers           a module's inputs and outputs -> their tensors, by path, and back
    traced               a hook's points in code that is being compiled
    untraced             hooks as torch.compile leaves them alone
    copies               what is saved or copied of an attached model has no hooks
    model_forward        the model itself, whose `forward` is wrapped
    packing              lengths of packed sequences, where context parallelism needs them
    module_tree          a model's modules as data, in the run's directory, for `grafter plan suggest`
    attachment           hooks on the selected modules of one model; `grafter.attach` makes one
    attached_models      all models of this rank that are attached
    parameters           `grafter.dump_model`: weights and buffers as points
    parameter_gradients  hooks that tell when a parameter's gradient has been added up

and for programs that never import grafter:

    startup              the start-up module that Python finds first on its path, and waits for torch
    first_call, roots    the first call of each model, and its attachment
    steps                what counts as a step where nobody calls `grafter.step()`
    adapters             mesh axes, read from the frameworks that this process uses
"""
