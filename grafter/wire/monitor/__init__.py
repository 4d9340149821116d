"""Watching: no wait goes unexplained, and nobody waits for the dead.

watch         what an exchange asks while it waits
waits         what each thread of this rank waits for
stages        what this rank does at a point: sending, voting, copying
board         a line per rank, in the store: running and at which stage, waiting for what, left; its last points
monitor_thread  the thread that looks after waits, ends the run, and tidies the store
lookout       one wait: put on the board once it lasts, and what must end it
members       all ranks of the run: their lines on the board, and who is gone
store_host    the process that hosts the store: stopped, gone, or on another host
store_link    the thread's client of the store, which may fall silent
store_patience  the dump thread's: an answer that the store owes is a wait, too
diagnosis     which ranks wait for each other without end (pure)
suspicion     how sure of it one must be before the run is ended
liveness      is that process there, stopped, or gone
processes     what /proc says of one
"""
