"""The network, its cache and its checkpoints. Knows tensors; not text, audio, requests or the engine."""
