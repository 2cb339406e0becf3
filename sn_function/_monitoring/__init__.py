"""What is seen of a model while it is trained."""
