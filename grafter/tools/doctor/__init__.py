"""`grafter doctor`: checks whether this machine and this pair of commands work with grafter. Read it in this order:

    finding         the result of one check: a level, a line, and what to do
    machine         Python, torch, packages, processor, memory, disk, clock, variables: one check after the other
    network         the store, a gloo group and shared memory, actually tried; the address of another machine's store

    probe           runs in the processes of a job; records inputs, weights, random states and outputs independently
    probe_log       reads what the probes of one run recorded, and compares two logs
    runs            runs the commands: without grafter, armed, against themselves, against each other
    determinism     is a command deterministic; do grafts onto itself, and grafter itself, change nothing
    initial_state   do both commands start from the same state
    pair_checks     what the pair's own points show
    checks          the runs in order, and what follows from each

`grafter/cli/doctor.py` is the command, `grafter/cli/doctor_page.py` prints the findings. Nothing is imported here,
because `grafter --help` should wait for neither torch nor rich.
"""
