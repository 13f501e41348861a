"""`tide serve`: a student behind an OpenAI-compatible interface.

`protocol` has requests and replies, `engine` the thread that decodes all that are asked for
together, `web` the routes, `server` the configuration and what the command runs.
"""
