"""What `millrace plan` shows before a job runs."""
