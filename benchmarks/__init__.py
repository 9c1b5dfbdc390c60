"""One script for each question. It writes a CSV file and draws a plot from it."""
