"""Using a trained model: its continuations of a prompt."""
