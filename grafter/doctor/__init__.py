"""`grafter doctor`: can this machine, can this pair of commands graft? It reads in this order:

    finding       what one check says: a level, a line, and what to do
    software      Python, torch, packages, CUDA, the start-up module
    system        processor, memory, disk, clock, /proc, descriptors
    sharing       shared memory between processes, really tried
    network       the store and a gloo group on loopback, really tried; the address of another machine's store
    environment   variables that are misspelt, illegal, or left over from a launcher
    machine       all of these, one after the other

    witness       runs in the processes of a job and notes inputs, weights, random states and outputs by itself
    notes         what the witnesses of one run noted, read
    trials        the commands run: without grafter, armed, against themselves, against one another
    repeats       is a command deterministic; is a graft onto itself no change
    observer      does grafter change what a command computes
    likeness      do both commands start alike
    pairing       what the pair's own points say
    examination   the trials in order, and what follows from each

    page          findings to look at, or JSON
    command       `grafter doctor` itself

Nothing is imported here: `grafter --help` should wait for neither torch nor rich.
"""
