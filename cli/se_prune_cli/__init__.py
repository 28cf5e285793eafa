"""The command line of se-prune."""
