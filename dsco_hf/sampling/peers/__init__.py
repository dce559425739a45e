"""Methods of others as baselines on one bench, each one file, written from its description."""
