"""What speed and memory are measured with. Run from the root of the repository."""
