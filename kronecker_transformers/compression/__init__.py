"""From a dense teacher to a factored student: nearest and calibrated factors, the search of a plan."""
