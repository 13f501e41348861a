"""The student's network: made or opened, run on [x_t ; x_0], written in other layouts."""
