"""Whole runs: what the command distill and the scripts in examples/ do."""
