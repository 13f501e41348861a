"""Programs that a model wrote, run apart: a judge holds the test and the verdict, a player runs the program.

`judge.py`, `player.py`, `plain.py` and `jail.py` are run as scripts in isolated interpreters and import nothing of this
package but each other.
"""
