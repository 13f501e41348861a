"""`tide publish`: a student's folder on the hub. `contents` is what goes there, `upload` how."""
