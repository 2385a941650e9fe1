"""What any JAX project would need: mesh, checkpoints, metrics, signals, the machine's peak."""
