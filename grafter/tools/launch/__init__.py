"""Running: `grafter run` starts both jobs, watches them, and sums up.

launcher         from the command to the exit code
job, job_keeper  one job below its keeper, so that nothing of it is left, whatever dies first
job_command      what the user typed, as a program and its arguments
job_environment  which variables a job gets and loses
run_output       both jobs' lines, prefixed
supervision      until both are gone: who died, who hangs, what the store says
watched_store    the hosted store, its death noticed
run_summary      a run directory, found and read
point_rows       both jobs' ledgers as one table, a row per point (pure)
run_problems     what makes the run a failure (pure)
run_notes        what else a reader should know (pure)
run_report       what is printed at the end
master_address   HOST:PORT, as other commands find a run
"""
