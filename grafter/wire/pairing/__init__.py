"""Pairing: before a byte of payload moves, both sides know what they exchange, and after it all write or none do.

participants     which ranks of this job share a point
manifest         what one rank says of its part (header); those of one role together
rank_set         many ranks in few characters
pairing          headers out, manifests of both sides back
meeting_place    where two leaders meet, for a side that does not wait there
known_texts      manifests and pairs that came before
refusals         manifests for which no point can be
mismatch         what headers must have in common, and the sentence where they do not
leaf_resharding  what goes where, by the layouts of both sides
paired_rows      what goes where, by the tokens of their rows
decision         one pure function of both manifests, the same on every rank: who sends what to whom, or why not
agreement        all receivers of a point write, or none does
commit_protocol  what a receiver does for that, step by step, as pure generators
critical_section drives them; holds every exception until the outcome is carried out
vote_log         the votes of one point, durable and in one order (host_votes in shared_ballots, store_votes)
"""
