"""Serving a model over HTTP: an engine that batches requests, and the OpenAI API in front of it."""
