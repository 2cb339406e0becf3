"""Arrays: intervals that surely hold the norm of a map."""
