"""`grafter doctor`: checks whether this machine and this pair of commands work with grafter. Read it in this order:

    finding       the result of one check: a level, a line, and what to do
    software      Python, torch, packages, CUDA, the start-up module
    system        processor, memory, disk, clock, /proc, descriptors
    sharing       shared memory between processes, actually tried
    network       the store and a gloo group on loopback, actually tried; the address of another machine's store
    environment   variables that are misspelt, illegal, or left over from a launcher
    machine       all of these, one after the other

    witness       runs in the processes of a job and records inputs, weights, random states and outputs independently
    notes         reads what the witnesses of one run recorded
    trials        runs the commands: without grafter, armed, against themselves, against each other
    repeats       is a command deterministic; does a graft onto itself change nothing
    observer      does grafter change what a command computes
    likeness      do both commands start from the same state
    pairing       what the pair's own points show
    examination   the trials in order, and what follows from each

    page          the findings as text, or JSON
    command       `grafter doctor` itself

Nothing is imported here, because `grafter --help` should wait for neither torch nor rich.
"""
