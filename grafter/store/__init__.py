"""Store: the files of a run. Ledger, dumps and recordings, written and read back."""
