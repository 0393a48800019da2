"""Reports on runs and configs: tables, plots and estimates."""
