"""The HTTP server: OpenAI's speech routes and the seeds' own, over one generator. Knows no model and no tensor.

``csm_core.server.app.create_app`` makes the ASGI application, ``csm_core.server.run.serve`` runs it.
"""
