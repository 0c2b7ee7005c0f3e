"""From a config to operators on a dataset."""
