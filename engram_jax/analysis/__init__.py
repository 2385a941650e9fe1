"""Analyses of a trained model: pictures of its gates."""
