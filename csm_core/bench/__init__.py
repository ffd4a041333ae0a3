"""``csm bench``: how fast a model is on this machine, for whom, and with which settings. A user of the engine's doors.

``sections`` measures, ``recommend`` searches, ``report`` and ``plot`` show; nothing here prints.
"""
