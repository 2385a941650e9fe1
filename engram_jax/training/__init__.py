"""Training: the loss, the learning rate, the optimizers of backbone and tables, and one step."""
