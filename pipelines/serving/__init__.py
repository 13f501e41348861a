"""`tide serve`: a student behind an OpenAI-compatible interface.

`protocol` has requests and replies, `answer` the text of one response as its blocks settle, `engine` the thread that
decodes all that are asked for together, `web` the routes, `run` the command.
"""
