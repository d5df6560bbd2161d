"""What is known: every trial, the best answer of each bucket, and what is not to be tried again."""
