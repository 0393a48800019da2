"""What is said of a run: tables, pictures and estimates."""
