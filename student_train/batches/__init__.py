"""What a step sees: batches as a pure function of the seed."""
