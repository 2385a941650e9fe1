"""Parts that any JAX project needs: mesh, shardings, processes, checkpoints, metrics, profiling."""
