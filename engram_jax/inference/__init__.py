"""Inference with a trained model: prefill, decoding, sampling, and rows from anywhere."""
