"""The ledger: which rows of a job are done, and their counts, whatever dies: `docs/decisions/0013-ledger.md`."""
