"""Wire: how ranks talk. Rendezvous, channels, pairing, commit, exchange, outbox, and the monitor of waits."""
