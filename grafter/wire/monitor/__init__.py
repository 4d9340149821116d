"""Monitor: every wait that lasts is explained, and ends if what it waits for can no longer come.

waits           what the dump thread waits for, and what begins and ends such a wait
monitor_thread  the thread of each rank that looks after waits, ends the run, and tidies the store
wait_monitor    one wait: shown on the board once it lasts, and what must end it
status_board    one line per rank, in the store: running and at which stage, waiting for what, or left; its last points
members         all ranks as one of them sees them: their lines on the board, and which processes are gone or stopped
deadlock        which ranks wait for each other without end, how sure of it one must be, and the error that says so
absence         one-sided points: whether the ranks that are waited for can still reach the point
store_silence   what each thread does while the store does not answer
"""
