"""Before paying: what a teacher needs, what a run costs, what a top-k keeps."""
