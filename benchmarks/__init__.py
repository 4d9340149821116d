"""What grafter costs, beside the other ways of doing the same, in one run on one machine.

python -m benchmarks [--quick] [--parts ...] [--ranks ...] [--sizes ...] [--sglang DIR] [--json FILE]

ways            one tensor crosses: grafter, all_gather_object, raw gloo, a copy, the grafter of sglang
workers         the processes that do it one way, started once; they wait for commands
rounds          A B A B: every way in every round, ratios within a round, medians over rounds
transfers, calls, footprint, summaries, capture, resharding, planning
                what is measured: time by size and ranks, single calls, memory and import, statistics
targets         what must be reached
report, tables  the output: tables and JSON
"""
