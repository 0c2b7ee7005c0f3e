"""The forecast of a job that `millrace plan` shows: lengths, rows that do not fit, replicas, time and price."""
