"""Outbox: points that never wait for the other job (`wait="job"`).

    sender      a snapshot into memory of its own; the leader posts that it is there; `dump` returns
    receiver    looks once. Posted: claim, pull, transform, agree, write. Else the point is missed, and the run goes on
    afterwards  the entry's state is one key of the store; each sender drops its copy once the state is final

An entry's life, decided by whoever changes its state first; the last of its senders to hear of the end deletes it.

    open -----> claimed ---> taken, skipped, failed          by the receivers' leader; failed also where it dies
       |-----> expired, displaced, withdrawn                 by any sender: too old, no room, one rank could not
       |-----> missed                                        by the senders' leader: the receivers had been there before

The meeting place is the key where leaders that wait swap manifests, so each may wait or not:

    manifest    a leader waits here
    posted      the senders' manifest; nobody waits
    missed      the receivers were here, found nothing, and went on
    gone        the entry that was posted here is no more; with its last state

states has the words, places what lies where, memory the snapshots, entries the outbox of a rank, kept_entries those of
one-sided points (and receivers who is to take them), posting the sender's
point, claims and pull the receiver's part. Who waits at the meeting place is `grafter.wire.pairing`'s to say.
"""
