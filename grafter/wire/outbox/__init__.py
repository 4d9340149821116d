"""Outbox: points that never wait for the other job (`wait="job"`).

    sender      takes a snapshot into memory of its own; its leader posts that it is there; `dump` returns
    receiver    looks once. If the point is posted: claim, pull, transform, agree, write. Else the point is missed
    afterwards  the entry's state is one key of the store; each sender frees its snapshot once the state is final

States of an entry. The first rank that changes the state decides; the last sender that reads a final state deletes it.

    open -----> claimed ---> taken, skipped, failed          by the receivers' leader; failed also if it dies
       |-----> expired, displaced, withdrawn                 by any sender: too old, no room, or one rank has no
       snapshot |-----> missed                                        by the senders' leader: the receivers had looked
       before |-----> one-sided                                     by any sender: the receivers have passed the point's
       step

Leaders that do not wait use the store key at which waiting leaders swap manifests, so each side may wait or not:

    manifest    a leader waits here
    posted      the senders' manifest; no rank waits
    missed      the receivers were here, found nothing, and continued
    gone        the entry that was posted here has ended; with its last state

outbox        the outbox of one rank
entries       one entry: its state in the store, its claim, its tombstone
snapshots     the memory of the snapshots
one_sided     entries of one-sided points, and how far their receivers are
pull          a receiver copies what it needs out of the senders' snapshots
delivery      snapshots for receivers of another host or user

`grafter.wire.pairing` finds out which side has arrived; the states are in `grafter.core.messages.states`.
"""
