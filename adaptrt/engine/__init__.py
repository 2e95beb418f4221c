"""The engine: sequences, paged KV cache, continuous batching, sampling and streaming text."""
