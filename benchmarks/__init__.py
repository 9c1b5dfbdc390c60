"""A script for each question; each writes a CSV file, and a plot drawn from it."""
