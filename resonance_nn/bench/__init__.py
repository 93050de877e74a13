"""Measurements beside a peer in the same process: one file a suite, each returns rows for a table, JSON and a plot."""
