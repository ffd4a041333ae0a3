"""Getting main.py onto a machine: checks before a deploy and a local stand-in for the platform.

Nothing in here is imported by the model, the engine or the generator.
"""
