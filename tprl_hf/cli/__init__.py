"""The `tprl` command, one file for each of its commands."""
