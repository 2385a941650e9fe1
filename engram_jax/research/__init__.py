"""Sweeps that ask whether the memory helps: budgets, arms, runs, statistics, reports.

allocation  experts, rows and widths at which two models have equal parameters and FLOPs
arms        the models that each kind of sweep compares, and the claims made of them
sweep       a folder of runs by index, started from a named commit, resumable
results     one row a run, as CSV
statistics  paired by seed: intervals, p, Holm, the smallest effect that would have been seen
report      tables, plots and sentences
"""
