"""What makes a simulation better, one technique a file."""
