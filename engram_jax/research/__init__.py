"""Sweeps that ask whether the memory helps: budgets, arms, runs, statistics, reports.

allocation  experts, rows and widths at which two models have equal parameters and FLOPs
arms        the models that each kind of sweep compares, and the claims made of them
source      the code of a commit, and the libraries that it runs with
sweep       a folder of runs by index, started from a named commit, resumable
runner      works through the runs, some at a time
statistics  paired by seed: intervals, p, Holm, the smallest effect that would have been seen
report      one row a run as CSV, and from it tables and plots (plots)
"""
