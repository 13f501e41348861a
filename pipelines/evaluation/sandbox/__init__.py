"""Programs that a model wrote, run apart: a judge holds the test and the verdict, a player runs the program.

`run` starts a judge; `judge` and `player` run in isolated interpreters; `remote` is the program's world as the test
sees it, `plain` what crosses between them, `jail` what both give up.
"""
