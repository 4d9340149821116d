"""Grafts from a recording: one job is recorded, and later played to the other job by separate processes.

    recorded_part   recording: what is kept of each point besides its values (the dumps keep those)
    recording       reading: what a role recorded, checked, rank by rank in program order
    played_rank     playing: one recorded rank reaches its points again, through an ordinary Grafter
    player          the program that plays: one process per recorded rank
    peer            GRAFTER_PEER: the first rank of a live job starts the player, and ends it

Pairing, planning, exchange, transform, agreement and write-back do not know that one side is a recording. Only the
messages do: a rank that is played says so when it joins (grafter/core/messages/roster.py).
"""
