"""Running a function again for its backward pass, as it ran before."""
