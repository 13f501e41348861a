"""Chats as people have them: every form and kind of file, as one sequence of conversations."""
