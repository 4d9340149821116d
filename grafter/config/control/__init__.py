"""Control: filters, statistics, windows, dumping and recorders of requests, changed while a run goes on, on every rank
at the same step boundary.

    in the store, under control/        by            what it does
    <n>                                 grafter ctl   proposes change n; the next one waits until this is decided
    <n>/answer/<graft rank>             each rank     accepts it, with the step that it is in; or refuses it, and why
    <n>/decision                        the first     in force from step S on; or refused, and why

A rank that has accepted ends no step before it knows the decision, so S, one more than the last step that any rank was
in, is ahead of all of them, in both jobs. Only monitor threads answer and decide, and those never wait for a
point: a rank that waits for the other job, or is held at the end of its step, keeps nobody from the decision.

The decision is put once, by whoever can: `grafter ctl`, graft rank 0, and, when its time is up, every rank; it then
says who did not answer. A `grafter ctl` that dies in the middle therefore leaves a change that is in force everywhere
or nowhere, and holds nobody for longer than the change allows.

change         what travels: proposal, answer, decision, state
in_force       the settings that can be changed, before and after a change (pure)
recorders      recorders of requests in a rank's process: changed, and told
traced         points in compiled code, whose treatment is settled already
rank_control   a rank's part: it answers, is held, and takes over
history        control.jsonl beside the ledgers: what was in force from which step on
table, command what it prints, and its options
"""
