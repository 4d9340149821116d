"""Control: filters, statistics, windows, dumping and request recorders, changed during a run on every rank at the same
step boundary.

    in the store, under control/        by              purpose
    <n>                                 grafter ctl     proposes change n; the next proposal waits for this decision
    <n>/answer/<graft rank>             each rank       accepts it, with the rank's step; or refuses it, with a reason
    <n>/decision                        the first one   the step S from which it holds; or why it is refused

A rank that has accepted ends no step before it knows the decision. So S, one more than the latest step of any rank, is
ahead of all ranks of both jobs. Only monitor threads answer and decide, and they never wait for a point: a rank
that waits for the other job, or is held at the end of its step, does not delay the decision.

The decision is written once, by the first of `grafter ctl`, graft rank 0, and, after the time limit, every rank; it
then names the ranks that did not answer. If a `grafter ctl` dies in between, its change therefore holds everywhere or
nowhere, and no rank is held longer than the change allows.

change                         what travels: proposal, answer, decision, state; and the store keys
in_force                       the settings that can be changed, before and after a change; points in compiled code
recorders                      the request recorders of a rank's process
wire/control.py                answers become one decision; the part of `grafter ctl`
runtime/rank_control.py        a rank's part: it answers, is held, and takes over the new settings
store/run_files.py             control.jsonl beside the ledgers: the changes and their steps
"""
