"""`grafter run` starts both jobs, supervises them, and returns how they ended. Read it in this order:

launcher      from the commands to the result: settings checked, store hosted, jobs started and watched
job           one job as the launcher sees it: its command, its keeper, its end
job_keeper    the process between launcher and job, so that nothing of the job is left, whatever dies first
run_output    both jobs' lines, prefixed
supervision   until both jobs are gone: deaths, signals, waits; the hosted store, and which ranks wait

`grafter/rank/job_environment.py` says which variables a job gets and loses, `grafter/cli/show.py` prints the end.
"""
