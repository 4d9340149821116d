"""Control: changes of a run, decided once for all ranks."""
