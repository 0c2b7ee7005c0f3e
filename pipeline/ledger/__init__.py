"""What is known to be done of a job, row by row, whatever died: `docs/decisions/0013-ledger.md`."""
