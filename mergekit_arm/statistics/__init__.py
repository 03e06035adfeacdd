"""What is measured, how it adds up, and the directory it lives in."""
