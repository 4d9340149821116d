"""What the ledgers of a run say: rows, counts, notes and problems."""
