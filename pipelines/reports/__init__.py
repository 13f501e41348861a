"""What came out: tables and pictures of finished runs."""
