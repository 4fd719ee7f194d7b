"""What is learned from a batch: each algorithm is one file of arrays in, loss terms out; none ever sees the model."""
