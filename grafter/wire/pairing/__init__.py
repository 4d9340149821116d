"""Pairing: before any payload moves, both sides know what they exchange. Commit: all receivers write, or none does.

pairing                  headers to the leader, manifests between the leaders, both manifests to all participants
nonblocking_rendezvous   the same for a side that does not wait for the other
manifest_cache           manifests and pairs that occurred before, and the check that a pair makes a point
agreement                the receivers of a point agree on its outcome
critical_section         carries out the commit protocol, and holds every exception until the outcome is carried out
vote_log                 the votes of one point, durable and in one order; in the store for receivers on several hosts
host_votes               the vote log of receivers on one host
shared_ballots           its votes in shared memory

What is decided from both manifests, and the steps of the commit protocol, are pure: `grafter.core.plan.decision`,
`grafter.core.commit_protocol`.
"""
