"""Command line: one file for the table of verbs, and one for each verb."""
