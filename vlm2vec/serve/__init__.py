"""Embeddings over HTTP: OpenAI's route extended by pictures, with a bound on everything that a client decides.

    protocol (connections, heads) -> app (body, key, counts) -> asking (bytes -> items) -> batcher (threads) -> answering (rows -> bytes)
"""
