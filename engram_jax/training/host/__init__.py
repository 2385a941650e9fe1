"""Training with the tables off the accelerator: rows and their optimizer's state on the host."""
