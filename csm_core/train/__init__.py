"""Training: the bundled voice from text to checkpoint. Each script is run with ``python -m csm_core.train.NAME``.

sentences -> teacher -> codec -> encode -> lm -> judge. Nothing here is imported by the serving path.
"""
