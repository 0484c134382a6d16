"""What is measured on a machine with a GPU: each script runs there alone and prints a table."""
