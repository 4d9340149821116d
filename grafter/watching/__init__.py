"""Watching: no wait goes unexplained, and nobody waits for the dead.

watch         what an exchange asks while it waits
waits         what each thread of this rank waits for
board         a line per rank, in the store: running, waiting for what, left; its last points
housekeeping  the thread that writes the board, finds who is gone, and tidies the store
diagnosis     which ranks wait for each other without end (pure)
suspicion     how sure of it one must be before the run is ended
liveness      is that process there, stopped, or gone
processes     what /proc says of one
"""
