"""Results for people: files, tables and plots."""
