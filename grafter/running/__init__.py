"""Running: `grafter run` starts both jobs, watches them, and sums up.

launcher         from the command to the exit code
job, job_keeper  one job below its keeper, so that nothing of it is left, whatever dies first
job_command      what the user typed, as a program and its arguments
job_environment  which variables a job gets and loses
run_output       both jobs' lines, prefixed
supervision      until both are gone: who died, who hangs, what the store says
watched_store    the hosted store, its death noticed
run_summary      both jobs' ledgers as one table (pure)
run_report       what is printed at the end
master_address   HOST:PORT, as other commands find a run
"""
