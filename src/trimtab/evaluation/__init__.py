"""Measuring what a plan costs and gives: tasks, the comparison of plans, and its report."""
